"""Checkpoints on an object store: what comes back, what is kept, and no damage that goes unseen."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_bucket import FakeBuckets, fake_buckets
from safetensors.flax import load_file
from state_run import CONFIG, assert_same, first_state, opened, saved, start_or_resume, train

from sol_jax.errors import UserError
from sol_jax.files import path_of
from sol_jax.runs.object_steps import ObjectStore, complete_steps
from sol_jax.runs.policy_files import POLICIES
from sol_jax.runs.tensors import pack, unpack

RUN = "gs://b/run"


@pytest.fixture(autouse=True)
def buckets(tmp_path):
    with fake_buckets(tmp_path / "buckets"):
        yield tmp_path / "buckets"


def listing(workdir=RUN):
    """Names in the checkpoint directory."""
    return sorted(path.name for path in (path_of(workdir, "x") / "checkpoints").iterdir())


def object_of(step, workdir=RUN):
    return path_of(workdir, "x") / "checkpoints" / f"{step}.safetensors"


def truncate(path):
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])


def empty(path):
    path.write_bytes(b"")


def flip(share):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[int(share * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


def test_what_comes_back_is_what_was_saved():
    states = saved(RUN)
    assert listing() == ["1.safetensors", "2.safetensors"]
    with opened(RUN) as checkpoints:
        step, found, iterator = checkpoints.restore(first_state())
        assert (step, iterator) == (2, {"position": 20})
        assert_same(found, states[2])
        assert_same(checkpoints.restore(first_state(), 1)[1], states[1])
        with pytest.raises(UserError, match=r"no checkpoint of step 3; the steps are \[1, 2\]"):
            checkpoints.restore(first_state(), 3)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float32", "int32", "uint32", "uint8", "bool", "int8", "float16"]
)
def test_every_kind_of_leaf(dtype):
    state = {
        "a": jnp.arange(6).reshape(2, 3).astype(dtype),
        "b": jnp.asarray(1, dtype),
        "c": jnp.zeros((0, 2), dtype),
    }
    with opened(RUN) as checkpoints:
        checkpoints.save(1, state, {})
        assert_same(checkpoints.restore(state)[1], state)


def test_bytes_are_those_of_a_file_that_the_library_reads(tmp_path):
    """Committed policies are bfloat16, and were written by it."""
    for file in POLICIES.rglob("policy.safetensors"):
        ours, theirs = unpack(file.read_bytes())[0], load_file(file)
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(ours[name], np.asarray(array))
    turned = {"x": np.arange(6, dtype=np.float32).reshape(2, 3).T, "one": np.array(7, np.int32)}
    (tmp_path / "file").write_bytes(pack(turned, {"meta": 'a "quoted" é'}))
    again, about = unpack((tmp_path / "file").read_bytes())
    assert about == {"meta": 'a "quoted" é'}
    for name, array in load_file(tmp_path / "file").items():
        np.testing.assert_array_equal(np.asarray(array), turned[name])
        np.testing.assert_array_equal(again[name], turned[name])


def test_a_run_resumed_at_any_step_ends_as_one_that_was_not_stopped(tmp_path):
    whole = train(first_state(), {"position": 0}, 7)
    for last in (3, 5, 7):
        with opened(RUN, keep=2) as checkpoints:
            state = train(*start_or_resume(checkpoints), last, checkpoints)
    assert_same(state, whole)
    assert listing() == ["6.safetensors", "7.safetensors"]


def test_the_latest_are_kept_and_the_best():
    scores = {1: 0.5, 2: 0.9, 3: None, 4: 0.9, 5: float("nan"), 6: 0.1, 7: 0.2}
    with opened(RUN, keep=2) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, first_state(), {}, score)
        checkpoints.wait()
        assert checkpoints.best_step() == 4
    assert listing() == ["4.safetensors", "6.safetensors", "7.safetensors"]
    with opened(RUN, keep=2) as checkpoints:  # whose scores must be read
        checkpoints.save(8, first_state(), {}, 0.3)
    assert listing() == ["4.safetensors", "7.safetensors", "8.safetensors"]


@pytest.mark.parametrize(
    "damage", [truncate, empty, *map(flip, (0, 0.01, 0.2, 0.5, 0.8, 1))], ids=lambda damage: damage.__name__
)
def test_no_damaged_object_leads_to_a_wrong_state(damage, caplog):
    states = saved(RUN)
    damage(object_of(2))
    kept = object_of(2).read_bytes()
    with opened(RUN) as checkpoints:
        step, found, _ = checkpoints.restore(first_state())
        assert step == 1
        assert_same(found, states[1])
        assert listing() == ["1.safetensors", "damaged-2.safetensors"]
        assert object_of(2).with_name("damaged-2.safetensors").read_bytes() == kept
        (told,) = (record.getMessage() for record in caplog.records if record.name == "absl")
        assert "gs://b/run/checkpoints: the checkpoint of step 2 is damaged (" in told
        assert "kept as damaged-2.safetensors; that of step 1 is used" in told
        checkpoints.save(2, states[2], {})  # the number is free again
        assert_same(checkpoints.restore(first_state())[1], states[2])
    damage(object_of(2))
    with opened(RUN) as checkpoints:
        checkpoints.restore(first_state())
    assert listing() == ["1.safetensors", "damaged-2.safetensors", "damaged-2.safetensors-again"]


def test_where_no_good_one_is_left_it_is_said():
    saved(RUN)
    truncate(object_of(1))
    truncate(object_of(2))
    with (
        opened(RUN) as checkpoints,
        pytest.raises(UserError, match=r"step 2 is damaged .*, step 1 is damaged .*; no other"),
    ):
        checkpoints.restore(first_state())
    assert listing() == ["1.safetensors", "2.safetensors"]


def test_who_only_reads_changes_nothing(buckets, caplog):
    states = saved(RUN)
    truncate(object_of(2))
    before = {file.name: file.read_bytes() for file in buckets.iterdir()}
    with opened(RUN, read_only=True) as checkpoints:
        assert_same(checkpoints.restore(first_state())[1], states[1])
    assert {file.name: file.read_bytes() for file in buckets.iterdir()} == before
    assert "kept as 2.safetensors" in caplog.text


def test_another_config_is_refused():
    saved(RUN)
    another = opened(RUN, CONFIG | {"grpo.gamma": 0.5})
    with another as checkpoints, pytest.raises(UserError, match=r"grpo.gamma was 0.85 and is now 0.5"):
        checkpoints.restore(first_state())


def test_a_save_that_fails_is_told_and_the_last_good_one_named(monkeypatch):
    saved(RUN)

    def gone(self, path, mode="rb", **kwargs):
        if mode == "wb":
            raise RuntimeError("503 Service Unavailable")
        return read(self, path, mode)

    with opened(RUN) as checkpoints:
        state, read = checkpoints.restore(first_state())[1], FakeBuckets._open
        monkeypatch.setattr(FakeBuckets, "_open", gone)
        checkpoints.save(3, state, {})
        with pytest.raises(
            UserError,
            match=r"step 3 could not be saved .*503 Service.*; the newest good checkpoint is of step 2",
        ):
            checkpoints.wait()
        monkeypatch.undo()
        checkpoints.save(3, state, {})
    assert listing()[-1] == "3.safetensors"


def test_a_copy_of_a_run_is_read_and_continued_here(tmp_path):
    """As `gsutil cp -r gs://b/run .` leaves it."""
    states = saved(RUN)
    copy = tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    for step in (1, 2):
        (copy / "checkpoints" / f"{step}.safetensors").write_bytes(object_of(step).read_bytes())
    with opened(copy) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert_same(checkpoints.restore(first_state())[1], states[2])
        checkpoints.save(3, states[2], {})
    assert complete_steps(copy / "checkpoints") == [1, 2, 3]
    assert listing(str(copy))[-1] == "3.safetensors"


def test_of_several_processes_the_first_writes(monkeypatch, buckets):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    store = ObjectStore(path_of(RUN, "x") / "checkpoints", 2, read_only=False)
    store.write(1, {"a": np.zeros(2)}, {"score": None})
    store.wait()
    store.close()
    assert list(pathlib.Path(buckets).iterdir()) == []
