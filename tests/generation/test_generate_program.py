"""`python -m sol_jax.generate`: its output, the policies it takes, mistakes in one sentence."""

import dataclasses
import pathlib
import re
import shutil
import types

import jax
import pytest
import tiny
import tokenizers
from in_process import run_program
from safetensors.numpy import load_file, save_file

from sol_jax.errors import UserError
from sol_jax.generation import html_page as page
from sol_jax.generation.load_engine import engine_for
from sol_jax.generation.options import GenerateOptions
from sol_jax.generation.terminal import paint
from sol_jax.rl.train_step import init_state
from sol_jax.runs import policy_files
from sol_jax.runs.checkpoints import Checkpoints


def save_run(workdir, flat, setup):
    """The workdir of a run that has written one checkpoint, of an untrained policy."""
    checkpoints = Checkpoints(workdir, flat, keep=1)
    checkpoints.save(1, init_state(jax.random.key(0), setup), {}, score=0.0)
    checkpoints.close()


@pytest.fixture(scope="module")
def policy(tiny_session, tmp_path_factory):
    """An untrained policy of the tiny session as a folder, and as the workdir of a run."""
    folder, workdir = tmp_path_factory.mktemp("policy") / "named", tmp_path_factory.mktemp("run")
    session = tiny_session
    state = init_state(jax.random.key(0), session.setup)
    about = {"title": "named", "model": "model", "documents": [], "updates": 0, "seed": 0}
    about |= {"command": "none", "commit": "none"}
    policy_files.save_policy(folder, state.params, session.config, about)
    save_run(workdir, session.config.flat(), session.setup)
    return types.SimpleNamespace(folder=str(folder), workdir=str(workdir), params=state.params)


def opened(tiny_folder, **given):
    """The engine and request that flags would give."""
    values = {"model": str(tiny_folder / "model"), "prompt": "the cat", "max_tokens": 12} | given
    return engine_for(GenerateOptions.from_dict(values))


def test_prompts_begin_as_the_tokenizer_has_texts_begin(tiny_folder, tmp_path):
    """With the special token that its file puts first (Llama 3's do), as transformers has it."""
    folder = shutil.copytree(tiny_folder / "model", tmp_path / "model")
    _, plain = opened(tiny_folder, prompt="the cat")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    first = backend.id_to_token(plain.prompt[-1])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, plain.prompt[-1])]
    )
    backend.save(str(folder / "tokenizer.json"))
    _, request = opened(tiny_folder, prompt="the cat", model=str(folder))
    assert request.prompt == [plain.prompt[-1], *plain.prompt]


@pytest.mark.parametrize("kind", ["folder", "workdir"])
def test_policies_come_from_folders_and_from_runs(tiny_folder, tiny_session, policy, kind):
    engine, request = opened(tiny_folder, policy=getattr(policy, kind), budget="0.5,0.7,0.5")
    assert engine.controller == "policy"
    assert engine.cfg.policy == tiny_session.setup.policy
    restated, _ = opened(tiny_folder, policy=getattr(policy, kind), budget="0.5,0.7,0.5", restate=True)
    asked = dataclasses.replace(tiny_session.setup.policy.config, restate=True)
    assert restated.cfg.policy == dataclasses.replace(tiny_session.setup.policy, config=asked)
    assert restated.cfg.policy.config.asked(False) == engine.cfg.policy.config
    assert engine.cfg.space == tiny_session.setup.space
    assert engine.cfg.horizon == tiny_session.setup.episode.horizon
    assert request.budget == (0.5, 0.7, 0.5)
    as_saved = lambda x: x.astype("bfloat16").astype("float32") if kind == "folder" else x
    saved = jax.tree.map(as_saved, policy.params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), engine.params, saved))


def test_a_schedule_takes_the_levels_of_the_policy_or_all(tiny_folder, tiny_session, policy):
    engine, _ = opened(tiny_folder, policy=policy.folder, controller="fixed", budget="0.5,0.7,0.5")
    assert (engine.controller, engine.params, engine.cfg.policy) == ("fixed", None, None)
    assert engine.cfg.space == tiny_session.setup.space
    engine, _ = opened(tiny_folder, controller="random", budget="0.5,0.7,0.5")
    assert engine.cfg.space.num_actions == 1560
    engine, _ = opened(tiny_folder)
    assert (engine.controller, engine.cfg.refresh) == ("dense", False)


def test_flags_reach_what_they_are_for(tiny_folder):
    engine, request = opened(
        tiny_folder, temperature=0.5, top_k=3, top_p=0.9, seed=4, stop=["x", "yz"], max_tokens=9,
        lossless=True, dtype="bfloat16", kernels="pallas",
    )  # fmt: skip
    rule = engine.cfg.sampling
    assert (rule.temperature, rule.top_k, rule.top_p) == (0.5, 3, 0.9)
    assert (request.seed, request.stops, request.max_tokens) == (4, ("x", "yz"), 9)
    assert engine.cfg.lossless
    assert engine.cfg.refresh
    assert engine.weights["embed"].dtype == "bfloat16"
    assert {engine.cfg.model.kernels, *(axis.kernels for axis in engine.cfg.space.axes)} == {"pallas"}


MISTAKES = {
    "empty prompt": ({"prompt": ""}, "--prompt is empty; give at least one character"),
    "long prompt": ({"prompt": "a" * 300}, "300 tokens, which with 12 to generate exceed"),
    "no policy": ({"controller": "policy", "budget": "1,1,1"}, "the controller policy needs a --policy"),
    "unknown policy": ({"policy": "no-such", "budget": "1,1,1"}, "there is no policy 'no-such'"),
    "no budget": ({"controller": "fixed"}, "the controller fixed needs a --budget, one number per axis"),
    "odd budget": ({"controller": "fixed", "budget": "half"}, "--budget=half: it must be numbers"),
    "budget of dense": ({"budget": "0.5,1,1"}, "--budget is for a policy or a schedule"),
    "system without chat": ({"system": "Be brief."}, "--system is part of a conversation; it needs --chat"),
    "short budget": ({"controller": "fixed", "budget": "1,1"}, "budget: 2 numbers were given; the axes are"),
    "low budget": ({"controller": "fixed", "budget": "0.01,1,1"}, "kappa = 0.01 cannot be met"),
    "temperature": ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
    "restate": ({"restate": True}, "--restate says how a policy is asked, and the controller is dense"),
    "lossless": ({"lossless": True, "refresh": False}, "refresh cannot be off"),
    "chat": ({"chat": True}, "this model has no chat template"),
    "kernels": ({"kernels": "triton"}, "--kernels: attend: 'triton' cannot run on this platform (cpu)"),
    "tokens": ({"max_tokens": 0}, "max_tokens is 0"),
    "model": ({"model": "no/such"}, "there is no folder no/such"),
    "negative seed": ({"seed": -1}, "seed is -1; it must be between 0 and 4294967295"),
    "large seed": ({"seed": 2**32}, "seed is 4294967296; it must be between 0 and 4294967295"),
    "bytes": ({"prompt": "caf\udce9"}, r"the text is not UTF-8: its character 4 is '\udce9'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_one_sentence(tiny_folder, name):
    given, sentence = MISTAKES[name]
    with pytest.raises(UserError, match=re.escape(sentence)) as mistake:
        opened(tiny_folder, **given)
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize("kind", ["folder", "workdir"])
def test_a_policy_for_another_model(tiny_folder, policy, kind, tmp_path):
    """Of another name, or another width under the same name."""
    source = getattr(policy, kind)
    other = tiny.save_model(tmp_path / "other")
    with pytest.raises(UserError, match="is for the model model, not for other"):
        opened(tiny_folder, policy=source, budget="0.5,0.7,0.5", model=str(other))
    wide = tiny.save_model(tmp_path / "model", hidden_size=48)
    with pytest.raises(UserError, match=r"does not fit a model|of another model") as mistake:
        opened(tiny_folder, policy=source, budget="0.5,0.7,0.5", model=str(wide))
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize("kind", ["folder", "workdir"])
def test_a_policy_goes_with_copies_of_its_model_and_with_no_other(tiny_folder, tiny_session, kind, tmp_path):
    """Whatever its name: what the files hold decides, where a policy knows that."""
    state = init_state(jax.random.key(0), tiny_session.setup)
    if kind == "folder":
        about = {"title": "named", "model": "model", "documents": [], "updates": 0, "seed": 0}
        about |= {"command": "none", "commit": "none", "identity": tiny_session.identity}
        policy_files.save_policy(tmp_path / "policy", state.params, tiny_session.config, about)
    else:
        checkpoints = Checkpoints(tmp_path / "policy", tiny_session.config.flat(), keep=1)
        checkpoints.bind(tiny_session.identity)
        checkpoints.save(1, state, {}, score=0.0)
        checkpoints.close()
    asked = {"policy": str(tmp_path / "policy"), "budget": "0.5,0.7,0.5"}
    copy = shutil.copytree(tiny_folder / "model", tmp_path / "another name")
    engine, _ = opened(tiny_folder, model=str(copy), **asked)
    assert engine.controller == "policy"
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(UserError) as mistake:
        opened(tiny_folder, model=str(copy), **asked)
    differ = f"the digest of its weights is {tiny_session.identity['weights']}, and here it is "
    assert differ in str(mistake.value)
    assert "another model" in str(mistake.value)
    assert "tokenizer" not in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_a_policy_for_other_actions(tiny_folder, policy, tmp_path):
    """Its config was edited: the parameters are those of eight actions."""
    folder = tmp_path / "edited"
    folder.mkdir()
    for file in pathlib.Path(policy.folder).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = (folder / "config.json").read_text()
    edited = re.sub(r'("axes.rho.levels": \[)[^]]*', r"\g<1>0.4, 0.7, 1.0", config)
    assert edited != config
    (folder / "config.json").write_text(edited)
    with pytest.raises(UserError, match=r"does not fit .* 12 actions"):
        opened(tiny_folder, policy=str(folder), budget="0.5,0.7,0.5")


def test_a_run_from_before_a_field_was_there(tiny_folder, tiny_session, policy, tmp_path):
    """Its config and checkpoint lack the field; it has the default."""
    flat = tiny_session.config.flat()
    del flat["policy.normalize_inputs"]
    save_run(tmp_path, flat, tiny_session.setup)
    engine, _ = opened(tiny_folder, policy=str(tmp_path), budget="0.5,0.7,0.5")
    assert not engine.cfg.policy.config.normalize_inputs


def test_a_run_without_a_checkpoint(tiny_folder, policy, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_bytes((pathlib.Path(policy.workdir) / "config.json").read_bytes())
    with pytest.raises(UserError, match="holds no checkpoint; "):
        opened(tiny_folder, policy=str(tmp_path), budget="0.5,0.7,0.5")


def test_tokens_are_painted_line_by_line():
    assert paint("a\nb", 1.0) == (
        "\x1b[38;2;0;0;0;48;2;66;146;198ma\x1b[0m\n\x1b[38;2;0;0;0;48;2;66;146;198mb\x1b[0m"
    )
    assert paint("", 0.1) == ""


@pytest.mark.slow
def test_the_program(tiny_folder, policy, tmp_path):
    """Text on one stream and numbers on the other; the same text on the page, beside the dense one."""
    out = tmp_path / "out.html"
    done = run_program(
        "sol_jax.generate",
        f"--model={tiny_folder / 'model'}", f"--policy={policy.folder}", "--prompt=the cat",
        "--max_tokens=14", "--budget=0.5,0.7,0.5", "--temperature=0.9", "--show-compute",
        f"--html={out}", "--stop=no such",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = dict(re.findall(r"^(\S+(?: \S+)*?) {2,}(.*)$", done.stderr, re.MULTILINE))
    assert told["controller"] == "policy"
    assert told["requested"] == "kappa 0.500, rho 0.700, eta 0.500"
    assert set(told) >= {
        "realised",
        "net keep rate",
        "bytes read",
        "operations",
        "log-probability",
        "tokens per second",
    }
    assert float(told["tokens per second"]) > 0
    assert told["tokens"].startswith("14, ended by length")
    text = re.sub(r"\x1b\[[\d;]*m", "", done.stdout).removesuffix("\n")
    assert text != done.stdout
    document = out.read_text("utf-8")
    sections = re.findall(r'<div class="text" dir="auto" lang="">(.*?)</div>', document, re.DOTALL)
    plain = [re.sub("<.*?>", "", section) for section in sections]
    assert len(plain) == 2
    assert plain[0] == "the cat" + page._text(text)
    assert "<h1>A text by model, shaded by compute</h1>" in document
    assert str(tiny_folder) not in document  # a page is sent to others: folders are nobody's business


def test_slips_on_the_command_line(tmp_path):
    """Before the model is looked for."""
    for args, sentence in (
        (("--prompt=a", f"--html={tmp_path / 'none' / 'out.html'}"), "the page cannot be written there"),
        (("--prompt=a", "--controller=best"), "controller"),
        ((), "prompt"),
    ):
        done = run_program("sol_jax.generate", "--model=/no/such", *args)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert sentence in line
