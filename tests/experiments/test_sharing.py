"""Policies pushed to a hub of our own on 127.0.0.1, and used from it and from its cache."""

import re
import shutil
import types

import hub_server
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import tiny
import yaml
from huggingface_hub import constants, hf_api
from in_process import run_program

from experiments import publish
from sol_jax.errors import UserError
from sol_jax.models import hub
from sol_jax.rl.train_step import init_state
from sol_jax.runs import policy_files


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub, whom this process knows by a token; its cache is a new folder."""
    with hub_server.Hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            served.address + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(hf_api.api, "endpoint", served.address)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield served


@pytest.fixture(scope="module")
def policy(tiny_session, tmp_path_factory):
    """An untrained policy of the tiny session, in a folder."""
    folder = tmp_path_factory.mktemp("policy") / "named"
    params = init_state(jax.random.key(0), tiny_session.setup).params
    about = {"title": "tiny/named", "model": "model", "documents": ["ab", "cd"], "updates": 3, "seed": 0}
    about |= {"command": "make it", "commit": "c0ffee", "identity": tiny_session.identity}
    policy_files.save_policy(folder, params, tiny_session.config, about)
    return types.SimpleNamespace(folder=folder, params=params)


def test_what_is_pushed_can_be_used_by_its_name(server, policy, tiny_folder, tmp_path):
    """Evaluated and generated from `hub:`, then once more when the hub is gone: the cache has it."""
    before = {file.name: file.read_bytes() for file in policy.folder.iterdir()}
    address = publish.push(policy.folder, "me/mine", sample="the cat")
    assert address == f"{server.address}/me/mine"
    assert set(server.repos["me/mine"]) == set(policy_files.FILES)
    assert {file.name: file.read_bytes() for file in policy.folder.iterdir()} == before
    params, _, about = policy_files.load_policy("hub:me/mine")
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(policy.params), strict=True):
        np.testing.assert_array_equal(one, other.astype(jnp.bfloat16).astype(jnp.float32))
    assert about["documents"] == ["ab", "cd"]
    generate = ["sol_jax.generate", f"--model={tiny_folder / 'model'}", "--policy=hub:me/mine",
                "--prompt=the cat", "--budget=0.5,0.7,0.5", "--max_tokens=6"]  # fmt: skip
    first = run_program(*generate)
    assert first.returncode == 0, first.stderr
    done = run_program("sol_jax.evaluate", "--policy=hub:me/mine", f"--output={tmp_path / 'out.csv'}",
                       "--controllers=fixed", "--num_blocks=2", "--budgets=0.5,0.7,0.65")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "hub:me/mine" in (tmp_path / "out.csv").read_text()
    server.down = True
    assert run_program(*generate).stdout == first.stdout


def test_the_card_has_what_the_hub_reads(server, policy):
    """Metadata in YAML, the picture beside it, and commands with the name that it has there."""
    publish.push(
        policy.folder, "me/mine", metadata={"base_model": "you/base", "datasets": ["you/text"]}, sample="a"
    )
    files = server.repos["me/mine"]
    _, front, text = files["README.md"].decode().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["license"] == "apache-2.0"
    assert fields["base_model"] == "you/base"
    assert fields["datasets"] == ["you/text"]
    assert fields["metrics"] == ["perplexity"]
    assert {"sol_jax", "arxiv:2605.10875"} <= set(fields["tags"])
    assert "--policy hub:me/mine" in text
    assert "](sample.png)" in text
    assert files["sample.png"].startswith(b"\x89PNG")


def test_the_picture_is_of_what_was_written(policy, tmp_path):
    folder = shutil.copytree(policy.folder, tmp_path / "copy")
    publish.add_picture(folder, "the cat")
    image = matplotlib.image.imread(folder / "sample.png")
    assert image.shape[1] > 1000
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 10  # shades and letters
    assert (folder / "sample.png").stat().st_size < 150_000
    assert "](sample.png)" in (folder / "README.md").read_text()


def test_what_is_unknown_is_left_out_of_the_metadata(policy):
    """The tiny model is a folder: that is no name on the hub."""
    front = (policy.folder / "README.md").read_text().split("---\n")[1]
    assert "base_model" not in front
    assert "datasets" not in front


def mistakes(server):
    """What one asks for -> how the hub is then, and what is told."""
    return {
        "no such repository": (
            "me/none",
            {},
            "there is no such repository, or it is private: check the name, or log",
        ),
        "no policy": (
            "me/model",
            {},
            "hub:me/model is no policy: it has no policy.safetensors; if it is a model",
        ),
        "gated": (
            "me/gated",
            {"token": ""},
            "it is gated: ask for access on its page, then log in with `hf auth",
        ),
        "private": ("me/private", {"token": ""}, "there is no such repository, or it is private"),
        "down": (
            "me/model",
            {"down": True},
            "it is not in the cache and the hub cannot be reached: check the network",
        ),
        "odd name": ("me", {}, "hub:me is no repository of the hub; write hub:OWNER/NAME"),
        "path": ("../../etc/passwd", {}, "is no repository of the hub; write hub:OWNER/NAME"),
    }


@pytest.mark.parametrize("name", mistakes(None))
def test_what_cannot_be_fetched_is_told_in_one_sentence(server, monkeypatch, name):
    for repo in ("me/model", "me/gated", "me/private"):
        server.repos[repo] = {"config.json": b"{}", "README.md": b"a model"}
    server.gated.add("me/gated")
    server.private.add("me/private")
    asked, state, sentence = mistakes(server)[name]
    server.down = state.get("down", False)
    if "token" in state:
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError) as told:
        policy_files.load_policy(f"hub:{asked}")
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


def test_without_a_network(server, monkeypatch):
    """Nothing listens there any more; offline mode says what it is."""
    closed = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    monkeypatch.setattr(hf_api.api, "endpoint", closed)
    with pytest.raises(
        UserError, match=r"not in the cache and the hub cannot be reached: check the network \(and"
    ):
        policy_files.load_policy("hub:me/mine")
    with pytest.raises(UserError, match="could not be written: the hub cannot be reached: check the network"):
        hub.push(policy_files.POLICIES, ["config.json"], "me/mine", private=False)


def test_pushing_needs_a_token_and_the_right(server, policy, monkeypatch):
    with pytest.raises(UserError, match="could not be written: your token may not do that"):
        publish.push(policy.folder, "others/mine")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        UserError, match=r"could not be written: the hub (does not|must) know who you are: log in"
    ):
        publish.push(policy.folder, "me/mine")


def test_a_private_repository_is_asked_for(server, policy):
    publish.push(policy.folder, "me/secret", private=True)
    assert server.private == {"me/secret"}


def test_a_policy_of_another_model(server, policy, tmp_path):
    publish.push(policy.folder, "me/mine")
    other = tiny.save_model(tmp_path / "model", hidden_size=48)
    done = run_program("sol_jax.generate", f"--model={other}", "--policy=hub:me/mine", "--prompt=a",
                       "--budget=0.5,0.7,0.5")  # fmt: skip
    assert done.returncode == 2
    assert re.search(r"\nerror: the policy hub:me/mine is for another model than [^\n]*\n$", done.stderr)


@pytest.mark.parametrize("broken", [
    b"", b"{", b"[]", b'{"about": {}, "config": {}}', b'{"about": {"documents": ""}, "config": {}}',
    b'{"about": {"documents": "", "updates": "many"}, "config": {}}',
    b'{"about": {"documents": "", "updates": 1, "identity": 3}, "config": {}}',
])  # fmt: skip
def test_a_strangers_files_are_refused_not_run_into(server, policy, broken):
    publish.push(policy.folder, "me/mine")
    server.repos["me/mine"]["config.json"] = broken
    with pytest.raises(UserError, match=r"the policy in .* cannot be read"):
        policy_files.load_policy("hub:me/mine")


def test_slips_on_the_command_line():
    for args, sentence in (
        (
            ("--name=a/b",),
            "give --workdir RUN to export a policy, or --push OWNER/NAME to upload one that is there",
        ),
        (("--name=a/b", "--push=b"), "--push 'b' must be OWNER/NAME, a repository of the hub"),
        (("--name=a/b", "--workdir=runs/x"), "give --command, the command that trained the policy"),
        (("--name=no/such", "--push=me/mine"), "there is no policy 'no/such'"),
    ):
        done = run_program("experiments.publish", *args)
        assert done.returncode == 2
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1
