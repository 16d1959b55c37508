"""Damaged checkpoints: never a wrong state, nothing lost."""

import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from state_run import assert_same, first_state, listing, opened, saved

from sol_jax.errors import UserError

# Damage.


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, pathlib.Path.unlink])
def test_no_damaged_file_leads_to_a_wrong_state(tmp_path, damage, caplog):
    states = saved(tmp_path / "good")
    step_2 = tmp_path / "good" / "checkpoints" / "2"
    fell_back = set()
    for number, file in enumerate(p.relative_to(step_2) for p in sorted(step_2.rglob("*")) if p.is_file()):
        workdir = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", workdir)
        damage(workdir / "checkpoints" / "2" / file)
        caplog.clear()
        with opened(workdir) as checkpoints:
            step, found, iterator = checkpoints.restore(first_state())
            assert_same(found, states[step])
            assert iterator == {"position": 10 * step}
            told = [record.getMessage() for record in caplog.records if record.name == "absl"]
            if step == 1:
                fell_back.add(file.name)
                assert listing(workdir) == ["1", "damaged-2"]
                assert len(told) == 1
                assert "the checkpoint of step 2 is damaged (" in told[0]
                assert "kept as damaged-2; that of step 1 is used" in told[0]
                checkpoints.save(2, states[2], {"position": 20})  # the number is free again
                assert_same(checkpoints.restore(first_state())[1], states[2])
            else:
                assert told == []
    assert {"metadata", "manifest.ocdbt"} <= fell_back
    assert any(len(name) == 32 for name in fell_back)  # the arrays themselves


def test_a_bit_that_flips_in_an_array_is_noticed(tmp_path, caplog):
    """Orbax reads such an array without complaint."""
    weights = np.random.default_rng(0).bytes(4000)  # incompressible, so stored as it is
    first, second = ({"w": jnp.array(np.frombuffer(weights, np.uint8) + n)} for n in (0, 1))
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, first, {})
        checkpoints.save(2, second, {})
    needle = np.asarray(second["w"]).tobytes()[1000:1100]
    files = [
        p for p in (tmp_path / "checkpoints" / "2").rglob("*") if p.is_file() and needle in p.read_bytes()
    ]
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        content[content.index(needle)] ^= 1
        file.write_bytes(content)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        read = manager.restore(2, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state["['w']"]
    assert (read != second["w"]).sum() == 1
    with opened(tmp_path) as checkpoints:
        step, found, _ = checkpoints.restore(first)
    assert step == 1
    assert_same(found, first)
    assert "its content does not match its sha256" in caplog.text


def test_several_damaged_steps_are_passed_over_and_all_are_kept(tmp_path, caplog):
    states = saved(tmp_path, [1, 2, 3])
    for attempt in range(2):
        for step in (2, 3):
            (tmp_path / "checkpoints" / str(step) / "meta" / "metadata").write_text("{")
        with opened(tmp_path) as checkpoints:
            step, found, _ = checkpoints.restore(first_state())
            assert step == 1
            assert_same(found, states[1])
            if attempt == 0:
                checkpoints.save(2, states[2], {})
                checkpoints.save(3, states[3], {})
    names = ["damaged-2", "damaged-2-again", "damaged-3", "damaged-3-again"]
    assert listing(tmp_path) == ["1", *names]
    assert len(caplog.records) == 4


def test_if_all_are_damaged_nothing_is_moved_and_the_run_does_not_start_over(tmp_path):
    saved(tmp_path)
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step) / "meta" / "metadata").write_text("{}")
    for _ in range(2):
        with opened(tmp_path) as checkpoints, pytest.raises(UserError) as error:
            checkpoints.restore(first_state())
        assert "step 2 is damaged (" in str(error.value)
        assert "step 1 is damaged (" in str(error.value)
        assert "no other is left" in str(error.value)
        assert "\n" not in str(error.value)
    assert listing(tmp_path) == ["1", "2"]


def test_a_damaged_step_of_choice_is_an_error_and_the_best_is_another(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, first_state(), {}, score=1.0)
        checkpoints.save(2, first_state(), {}, score=2.0)
        checkpoints.wait()
        assert checkpoints.best_step() == 2
    (tmp_path / "checkpoints" / "2" / "meta" / "metadata").write_text("{")
    with opened(tmp_path) as checkpoints:
        assert checkpoints.best_step() == 1
        with pytest.raises(UserError, match=r"step 2 is damaged \(.*\); the steps are \[1, 2\]"):
            checkpoints.restore(first_state(), step=2)
    assert listing(tmp_path) == ["1", "2"]
