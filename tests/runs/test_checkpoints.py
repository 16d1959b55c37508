"""Checkpoints: what is saved comes back to the bit, the best are kept, other runs are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from state_run import CONFIG, assert_same, first_state, opened, saved, start_or_resume, train, tree_of

from sol_jax.errors import UserError
from sol_jax.rl.train_step import TrainState
from sol_jax.runs.checkpoints import Checkpoints

# What comes back.


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("abstract", [False, True])
def test_a_state_comes_back_to_the_bit(tmp_path, reference, abstract):
    state = train(first_state(reference=reference), {"position": 0}, 3)
    expected = jax.tree.map(jnp.copy, state)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, state, {"position": 9, "fingerprint": 2**48 - 1})
    like = first_state(reference=reference)
    with opened(tmp_path) as checkpoints:
        step, found, iterator = checkpoints.restore(jax.eval_shape(lambda: like) if abstract else like)
    assert (step, iterator) == (3, {"position": 9, "fingerprint": 2**48 - 1})
    assert_same(found, expected)
    assert isinstance(found, TrainState)
    assert isinstance(found.opt_state, optax.MultiStepsState)
    assert (found.reference is None) != reference


def test_awkward_leaves(tmp_path):
    tree = {
        "nan": jnp.array([jnp.nan, -jnp.nan, -0.0, jnp.inf, 1e-45], jnp.float32),
        "a/b.c": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "a": {"b.c": jnp.array([True, False])},
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "scalar": jnp.uint32(4_000_000_000),
        "raw key": jax.random.PRNGKey(5),
        "keys": jax.random.split(jax.random.key(5), 3),
        "rbg": jax.random.key(5, impl="rbg"),
        "on a device": jax.device_put(jnp.ones(3), jax.devices()[0]),
        "none": None,
        "nothing": (),
    }
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {})
        _, found, _ = checkpoints.restore(tree)
    assert_same(found, tree)


def test_donating_the_state_at_once_does_not_change_what_is_saved(tmp_path):
    scramble = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {"w": jnp.arange(1_000_000, dtype=jnp.float32)}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        state = scramble(state)
        _, found, _ = checkpoints.restore(state)
    np.testing.assert_array_equal(found["w"], np.arange(1_000_000, dtype=np.float32))


@pytest.mark.parametrize("stop", [3, 4])  # inside and between the optimizer's accumulations
def test_a_resumed_run_ends_with_the_parameters_of_an_uninterrupted_one(tmp_path, stop):
    with opened(tmp_path) as checkpoints:
        train(*start_or_resume(checkpoints), stop, checkpoints, every=stop)
    with opened(tmp_path, CONFIG | {"train.num_updates": 9}) as checkpoints:
        resumed = train(*start_or_resume(checkpoints), 9, checkpoints)
    assert_same(resumed, train(first_state(), {"position": 0}, 9))


def test_a_new_workdir_holds_nothing_and_gets_the_config(tmp_path):
    with opened(tmp_path / "a" / "b") as checkpoints:
        assert checkpoints.restore(first_state()) is None
        assert (checkpoints.steps(), checkpoints.latest_step(), checkpoints.best_step()) == ([], None, None)
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text()) == CONFIG


def test_a_step_of_choice(tmp_path):
    states = saved(tmp_path)
    with opened(tmp_path) as checkpoints:
        step, found, iterator = checkpoints.restore(first_state(), step=1)
        with pytest.raises(UserError, match=r"no checkpoint of step 7; the steps are \[1, 2\]"):
            checkpoints.restore(first_state(), step=7)
    assert (step, iterator) == (1, {"position": 10})
    assert_same(found, states[1])


def test_a_step_that_exists_is_not_written_again(tmp_path):
    states = saved(tmp_path, [1])
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, first_state(), {"position": 99})
        checkpoints.wait()
        assert_same(checkpoints.restore(first_state())[1], states[1])


# What is kept.


@pytest.mark.parametrize(
    ("keep", "scores", "kept", "best"),
    [
        (2, [None, None, None, None], [3, 4], None),
        (1, [0.5, 0.1, 0.2, 0.3], [1, 4], 1),
        (2, [-3.0, -1.0, None, -2.0, None], [2, 4, 5], 2),
        (1, [0.5, None, 0.5, None], [3, 4], 3),  # of equals the later
        (1, [0.5, float("nan"), float("inf"), 0.4], [1, 4], 1),  # not finite: no score
        (3, [0.1, 0.2], [1, 2], 2),
    ],
)
@pytest.mark.parametrize("restart", [False, True])
def test_the_latest_and_the_best_are_kept(tmp_path, keep, scores, kept, best, restart):
    checkpoints = Checkpoints(tmp_path, CONFIG, keep)
    for step, score in enumerate(scores, 1):
        checkpoints.save(step, {"w": jnp.ones(2)}, {}, score)
        if restart:  # scores are then read from the disk
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, CONFIG, keep)
    checkpoints.wait()
    assert checkpoints.steps() == kept
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (len(scores), best)
    checkpoints.close()


# Other runs.


def test_settings_that_do_not_change_what_is_learned_may_change(tmp_path):
    states = saved(tmp_path)
    config = CONFIG | {"train.num_updates": 80, "eval.every": 1, "memory.head_rows": 2, "data.cache_dir": "x"}
    del config["eval.every"]
    with opened(tmp_path, config | {"train.new": 1}) as checkpoints:
        assert_same(checkpoints.restore(first_state())[1], states[2])
    assert json.loads((tmp_path / "config.json").read_text()) == config | {"train.new": 1}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"grpo.gamma": 0.9}, "grpo.gamma was 0.85 and is now 0.9;"),
        ({"axes.kappa.levels": [0.1, 0.5]}, r"axes.kappa.levels was \[0.1, 1.0\] and is now \[0.1, 0.5\];"),
        ({"grpo.new": 1}, "grpo.new was 'absent' and is now 1;"),
        ({"data.source": None}, "data.source was 'wikipedia' and is now 'absent';"),
        (
            {f"grpo.f{n}": n for n in range(7)},
            "grpo.f4 was 'absent' and is now 4 and 2 more; use another workdir",
        ),
    ],
)
def test_a_checkpoint_of_another_config_is_refused_and_left_alone(tmp_path, change, told):
    saved(tmp_path)
    config = {name: value for name, value in (CONFIG | change).items() if value is not None}
    before = tree_of(tmp_path)
    with (
        opened(tmp_path, config) as checkpoints,
        pytest.raises(UserError, match=f"step 2 is of another config: .*{told}"),
    ):
        checkpoints.restore(first_state())
    assert tree_of(tmp_path) == before


def test_a_checkpoint_of_another_model_is_refused_and_left_alone(tmp_path):
    ours = {"weights": "aaaa", "tokenizer": "bbbb"}
    with opened(tmp_path) as checkpoints:
        checkpoints.bind(ours)
        checkpoints.save(1, first_state(), {})
    before = tree_of(tmp_path)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.identity_of(1) == ours
        checkpoints.bind(ours | {"weights": "cccc"})
        told = (
            "/checkpoints: the checkpoint of step 1 is of another model: the digest of its weights is aaaa, "
            "and here it is cccc; use another workdir, or the model files that the run began with$"
        )
        with pytest.raises(UserError, match=told):
            checkpoints.restore(first_state())
        checkpoints.bind({"weights": "cccc", "tokenizer": "dddd"})
        with pytest.raises(UserError, match=r"its tokenizer is bbbb.*; the digest of its weights is"):
            checkpoints.restore(first_state())
        assert tree_of(tmp_path) == before
        checkpoints.bind(ours)
        assert checkpoints.restore(first_state())[0] == 1


def test_a_checkpoint_of_another_cost_model_is_refused_wherever_the_file_is(tmp_path):
    config = CONFIG | {"axes.budget_unit": "time", "axes.prices": "a.json"}
    with opened(tmp_path, config) as checkpoints:
        checkpoints.bind({"weights": "aaaa", "prices": "bbbb"})
        checkpoints.save(1, first_state(), {})
    with opened(tmp_path, config) as checkpoints:
        checkpoints.bind({"weights": "aaaa", "prices": "cccc"})
        told = (
            "step 1 is of another cost model: the digest of its prices is bbbb, and here it is cccc; use "
            r"another workdir, or the config\.axes\.prices that the run began with$"
        )
        with pytest.raises(UserError, match=told):
            checkpoints.restore(first_state())
    with opened(tmp_path, config | {"axes.prices": "b/moved.json"}) as checkpoints:
        checkpoints.bind({"weights": "aaaa", "prices": "bbbb"})
        assert checkpoints.restore(first_state())[0] == 1


def test_a_checkpoint_that_does_not_name_its_model_is_taken(tmp_path):
    """Checkpoints from before models were told apart by their content."""
    states = saved(tmp_path)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.identity_of(2) == {}
        checkpoints.bind({"weights": "aaaa", "tokenizer": "bbbb"})
        assert_same(checkpoints.restore(first_state())[1], states[2])


@pytest.mark.parametrize("read_only", [False, True])
def test_a_run_from_before_an_option_was_there_goes_on(tmp_path, read_only):
    """With its default, which is what the code did before; with anything else the run would be another."""
    states = saved(tmp_path)
    later = CONFIG | {"axes.kappa.read_newest": False, "grpo.returns": "sum"}
    with opened(tmp_path, later, read_only=read_only) as checkpoints:
        assert_same(checkpoints.restore(first_state())[1], states[2])
    changed = CONFIG | {"axes.kappa.read_newest": True}
    with (
        opened(tmp_path, changed, read_only=read_only) as checkpoints,
        pytest.raises(UserError, match=r"axes\.kappa\.read_newest was False and is now True;"),
    ):
        checkpoints.restore(first_state())


def test_a_state_of_another_shape_is_refused_and_left_alone(tmp_path):
    saved(tmp_path)
    before = tree_of(tmp_path)
    with opened(tmp_path) as checkpoints:
        with pytest.raises(
            UserError, match=r"model or version: .*'float32\[3, 5\]' and is now 'float32\[3, 6\]'"
        ):
            checkpoints.restore(first_state(width=6))
        with pytest.raises(UserError, match="was 'absent'"):
            checkpoints.restore(first_state(reference=True))
        with pytest.raises(UserError, match=r"\.key was 'key<fry>\[\]' and is now 'uint32\[2\]'"):
            checkpoints.restore(first_state()._replace(key=jax.random.PRNGKey(0)))
    assert tree_of(tmp_path) == before


def test_reading_only_changes_nothing(tmp_path, caplog):
    states = saved(tmp_path)
    (tmp_path / "checkpoints" / "2" / "meta" / "metadata").write_text("{")
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()  # of a save that goes on elsewhere
    before = tree_of(tmp_path)
    with opened(tmp_path, CONFIG | {"train.num_updates": 1}, read_only=True) as checkpoints:
        step, found, _ = checkpoints.restore(first_state())
    assert step == 1
    assert_same(found, states[1])
    assert "kept as 2; that of step 1 is used" in caplog.text
    assert tree_of(tmp_path) == before
    with opened(tmp_path / "nowhere", read_only=True) as checkpoints:
        assert checkpoints.restore(first_state()) is None
    assert not (tmp_path / "nowhere").exists()
