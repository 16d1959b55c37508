"""Policies as files: what comes back, what is refused, and what the card says."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import yaml
from small_models import llama_config

from sol_jax.errors import UserError
from sol_jax.rl.train_step import init_state
from sol_jax.runs import policy_files
from sol_jax.runs.config import RunConfig
from sol_jax.runs.policy_card import front_matter, metadata

ABOUT = {
    "title": "tiny/sol-j-2l",
    "model": "tiny",
    "command": "python -m sol_jax.train --config configs/sol_j_2l.py:smoke --workdir runs/tiny",
    "updates": 3,
    "seed": 0,
    "commit": "abc1234",
    "documents": ["0123456789", "abcdef0123"],
    "results": ["| text | 0.5 / 0.7 / 0.65 | 0.62 | 20.1 | 21.5 | +0.067 [+0.05, +0.08] |"],
}


@pytest.fixture(scope="module")
def params(tiny_session):
    return init_state(jax.random.key(0), tiny_session.setup).params


@pytest.fixture
def folder(params, tiny_session, tmp_path, monkeypatch):
    """A committed policy `tiny/sol-j-2l`."""
    monkeypatch.setattr(policy_files, "POLICIES", tmp_path)
    policy_files.save_policy(tmp_path / "tiny" / "sol-j-2l", params, tiny_session.config, ABOUT)
    return tmp_path / "tiny" / "sol-j-2l"


def told(mistake):
    message = str(mistake.value)
    assert "\n" not in message
    return message


def fits(session, params, config, about=ABOUT, run=None, setup=None):
    """Nothing, or a `UserError` if the policy does not go with the session's model or what is given."""
    run, setup = run or session.config, setup or session.setup
    policy_files.check_fits("P", params, config, about, run, setup, session.identity)


def test_what_comes_back(folder, params, tiny_session):
    """By name and by folder: the same tree, rounded to bfloat16, and the config field by field."""
    for name in ("tiny/sol-j-2l", folder, str(folder)):
        found, config, about = policy_files.load_policy(name)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
            assert one.dtype == jnp.float32
            np.testing.assert_array_equal(one, other.astype(jnp.bfloat16).astype(jnp.float32))
        assert config == tiny_session.config
        assert config.flat() == tiny_session.config.flat()
        assert about == ABOUT
        fits(tiny_session, found, config, about)


def test_a_policy_that_predicts_losses_keeps_its_prices_and_its_learner(tiny_session, tmp_path):
    """Budgets hold as well as the table of prices does, so that is not rounded; GRPO's network is another."""
    own = tiny_session.config.with_fields({"policy.predict_losses": True, "learner": "counterfactual"})
    setup = own.setup(tiny_session.setup.model)
    params = init_state(jax.random.key(0), setup).params
    policy_files.save_policy(tmp_path / "cf", params, own, ABOUT)
    found, config, _ = policy_files.load_policy(tmp_path / "cf")
    np.testing.assert_array_equal(found["prices"]["cost"], params["prices"]["cost"])
    fits(tiny_session, found, config, run=own, setup=setup)
    with pytest.raises(UserError, match=r"has config\.policy\.predict_losses = True, and here it is False"):
        fits(tiny_session, found, config)


def test_a_field_that_came_later_has_its_default(folder):
    """A policy saved before the config had a field is loaded as what the code did then."""
    file = folder / "config.json"
    described = json.loads(file.read_text())
    del described["config"]["policy.factored_head"]
    file.write_text(json.dumps(described))
    _, config, _ = policy_files.load_policy(folder)
    assert config.policy.factored_head is False


def test_a_policy_of_all_levels_can_be_published():
    """1,560 actions, scored level by level (`fast`): d_model 128 fits, the paper's 512 does not."""
    from configs import sol_j_fl

    def bytes_of(d_model):
        config = sol_j_fl.get_config("fast")
        config.policy.d_model = d_model
        model = llama_config(vocab_size=49152, hidden_size=576, max_position=8192)
        setup = RunConfig.from_dict(config.to_dict()).setup(model)
        params = jax.eval_shape(lambda: init_state(jax.random.key(0), setup).params)
        return 2 * sum(leaf.size for leaf in jax.tree.leaves(params))

    assert bytes_of(128) < policy_files.MAX_BYTES < bytes_of(512)


def test_a_policy_that_is_too_large(params, tiny_session, tmp_path, monkeypatch):
    monkeypatch.setattr(policy_files, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match=r"more than the 0\.001 MB of a published one; train one with"):
        policy_files.save_policy(tmp_path / "large", params, tiny_session.config, ABOUT)
    assert not (tmp_path / "large").exists()


def test_an_unknown_name_lists_the_known_ones(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError) as mistake:
        policy_files.load_policy("tiny/sol-j-3l")
    assert told(mistake) == (
        "there is no policy 'tiny/sol-j-3l'; give a folder that has one, hub:OWNER/NAME, or one of: "
        "tiny/sol-j-2l; write hub:tiny/sol-j-3l to fetch it from the Hugging Face hub"
    )
    monkeypatch.setattr(policy_files, "POLICIES", tmp_path / "empty")
    with pytest.raises(UserError, match="one of: none yet"):
        policy_files.load_policy("tiny/sol-j-3l")


@pytest.mark.parametrize("file", ["policy.safetensors", "config.json"])
def test_damaged_files(folder, file):
    path = folder / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError) as mistake:
        policy_files.load_policy(folder)
    assert str(folder) in told(mistake)
    assert "restore its files" in told(mistake)


def refused(tiny_folder, params, tiny_session, **fields):
    run = tiny.config_for(tiny_folder, **fields)
    setup = run.setup(tiny_session.setup.model)
    with pytest.raises(UserError) as mistake:
        fits(tiny_session, params, tiny_session.config, run=run, setup=setup)
    return told(mistake)


def test_a_policy_for_another_model(tiny_folder, params, tiny_session):
    message = refused(tiny_folder, params, tiny_session, **{"model.path": "hub:meta-llama/Llama-3.2-1B"})
    assert message == "the policy P is for the model model, not for Llama-3.2-1B"


def test_a_policy_is_for_a_model_by_its_content(tiny_folder, params, tiny_session):
    """Wherever that lies and however it is called; its name counts only for policies that know no more."""
    config, own = tiny_session.config, tiny_session.identity
    elsewhere = tiny.config_for(tiny_folder, **{"model.path": "elsewhere/another-name"})
    fits(tiny_session, params, config, ABOUT | {"identity": own}, run=elsewhere)
    for theirs, told_of in (
        ({**own, "weights": "0123"}, ["weights"]),
        ({**own, "tokenizer": "0123"}, ["tokenizer"]),
        ({"weights": "0123", "tokenizer": "4567"}, ["tokenizer", "weights"]),
    ):
        with pytest.raises(UserError) as mistake:
            fits(tiny_session, params, config, ABOUT | {"identity": theirs})
        differ = [f"the digest of its {x} is {theirs[x]}, and here it is {own[x]}" for x in told_of]
        path = config.model.path
        assert told(mistake) == f"the policy P is for another model than {path}: {'; '.join(differ)}"


@pytest.mark.parametrize(
    ("field", "value"),
    [("axes.kappa.levels", (0.1, 0.5, 1.0)), ("episode.horizon", 8), ("policy.page_input", True)],
)
def test_a_policy_for_other_actions(tiny_folder, params, tiny_session, field, value):
    message = refused(tiny_folder, params, tiny_session, **{field: value})
    assert message.startswith(f"the policy P has config.{field} = ")
    assert str(list(value) if isinstance(value, tuple) else value) in message


def test_a_policy_of_another_size(tiny_folder, params, tiny_session):
    """A model of the same name but wider: told by the shapes."""
    import dataclasses

    wide = dataclasses.replace(tiny_session.setup.policy, hidden_size=64)
    setup = dataclasses.replace(tiny_session.setup, policy=wide)
    with pytest.raises(UserError) as mistake:
        fits(tiny_session, params, tiny_session.config, setup=setup)
    assert "does not fit a model of hidden size 32 and 8 actions: its params.observation_in" in told(mistake)


def test_model_names():
    for path in ("hub:meta-llama/Llama-3.2-1B", "/models/Llama-3.2-1B", "Llama-3.2-1B"):
        config = tiny.config_for(pathlib.Path("."), **{"model.path": path})
        assert policy_files.model_name(config) == "Llama-3.2-1B"


def test_the_card(folder, tiny_session):
    text = (folder / "README.md").read_text()
    for part in (
        "# tiny/sol-j-2l", "`--policy tiny/sol-j-2l`", ABOUT["command"], "| 3, 0, abc1234 |", "2 documents",
        "| levels of kappa | 0.1, 1 |", "| levels of eta | 5, 16 |", ABOUT["results"][0], "bfloat16",
        "32 tokens of prefix, 4 steps",
    ):  # fmt: skip
        assert part in text
    untested = policy_files.card(tiny_session.config, ABOUT | {"results": []}, 1000, picture=False)
    assert "Measured" not in untested
    assert "sample.png" not in untested
    assert "sample.png" in policy_files.card(tiny_session.config, ABOUT, 1000, picture=True)


@pytest.mark.parametrize(
    ("fields", "about", "expected"),
    [
        ({"model.path": "smollm2-135m"}, {}, {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}),
        ({"model.path": "hub:me/llama"}, {}, {"base_model": "me/llama"}),
        ({"model.path": "/data/me/llama"}, {}, {}),
        ({"model.path": "/data/me/llama"}, {"base_model": "me/llama"}, {"base_model": "me/llama"}),
        ({"data.source": "wikipedia"}, {}, {"datasets": ["wikipedia"]}),
        ({"data.source": "tfds:lm1b/en:train"}, {}, {"datasets": ["lm1b/en"]}),
        ({"data.source": "/data/me/*.txt"}, {"license": "mit"}, {"license": "mit"}),
    ],
)
def test_the_hub_is_told_what_is_known_and_nothing_else(tiny_folder, fields, about, expected):
    config = tiny.config_for(tiny_folder, **fields)
    found = metadata(config, ABOUT | about)
    always = {"license": "apache-2.0", "library_name": "sol_jax", "metrics": ["perplexity"]}
    known = always | expected
    if "base_model" in expected:
        known["base_model_relation"] = "adapter"
    assert {name: value for name, value in found.items() if name != "tags"} == known
    assert "grpo" in found["tags"]
    assert "/data/me" not in str(found)


def test_metadata_is_yaml_whatever_it_holds():
    fields = {"license": "other: 'a' # b", "tags": ["- x", "[y]", "\u00e9\n"]}
    lines = front_matter(fields)
    assert (lines[0], lines[-2]) == ("---", "---")
    assert yaml.safe_load("\n".join(lines[1:-2])) == fields


@pytest.mark.parametrize("name", policy_files.known_policies())
def test_committed_policies_can_be_loaded(name):
    """Each has a card, fits its size, and belongs to the levels it says."""
    params, config, about = policy_files.load_policy(name)
    assert about["title"] == name
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) * 2 <= policy_files.MAX_BYTES
    assert (policy_files.POLICIES / name / "README.md").is_file()
    assert config.data.source


@pytest.mark.parametrize(("recorded", "shown"), [("", "c0ffee"), ("ab1e+", "ab1e+")])
def test_a_run_is_published(tiny_folder, tiny_session, tmp_path, monkeypatch, recorded, shown):
    """The best checkpoint, who trained it, its documents, and the results of an evaluation in the card."""
    from experiments import publish
    from sol_jax.evaluation.provenance import open_text
    from sol_jax.evaluation.report import report_run
    from sol_jax.runs.checkpoints import Checkpoints

    config = tiny.config_for(tiny_folder, **{"eval.num_test_blocks": 2, "eval.num_random": 0})
    checkpoints = Checkpoints(tmp_path / "run", config.flat(), keep=1, commit=recorded)
    states = [init_state(jax.random.key(seed), tiny_session.setup) for seed in range(3)]
    for step, (state, score) in enumerate(zip(states, (1.0, 3.0, 2.0), strict=True), start=1):
        checkpoints.save(step, state, {"position": 0}, score)
    checkpoints.close()
    session = open_text(config, "", "")
    rows = report_run(session, states[1], tmp_path / "run")
    monkeypatch.setattr(policy_files, "POLICIES", tmp_path / "policies")
    publish.publish(
        tmp_path / "run", "tiny/best", "make it", [tmp_path / "run" / "results.csv"], trained_by="c0ffee"
    )
    params, _, about = policy_files.load_policy("tiny/best")
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), states[1].params)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (about["updates"], about["commit"]) == (2, shown)
    assert about["identity"] == session.identity
    assert about["documents"] == policy_files.document_names(session.blocks["train"].documents)
    fixed = next(row for row in rows if row.controller == "fixed")
    assert (
        f"| {fixed.perplexity:.2f} | {fixed.gain:+.4f} ["
        in policy_files.load_policy("tiny/best")[2]["results"][0]
    )
    assert len(about["results"]) == len(config.eval.budgets)
