"""Programs run from Python say what they say, and fail in their own sentence; notebooks show it alone."""

import pytest

import sol_jax
from pallas_kernels.errors import UnavailableError
from sol_jax.errors import UserError
from sol_jax.runs.config import RunConfig
from sol_jax.training import from_config


def test_a_program_runs_and_is_heard(tmp_path, capfd):
    rows = "experiments/results/smollm2-135m/sol-j-2l-s0.csv"
    said = sol_jax.run_program("experiments.figures.front", results=rows, output=tmp_path / "front.png")
    assert said == capfd.readouterr().out == f"drew {tmp_path / 'front.png'}\n"
    assert (tmp_path / "front.png").stat().st_size > 5000


def test_lists_have_commas():
    with pytest.raises(UserError, match="unrecognized arguments: --nothing=1,b"):
        sol_jax.run_program("experiments.figures.front", results="a", output="b", nothing=(1, "b"))


def test_a_program_that_fails_is_told_by_its_own_sentence(capfd):
    with pytest.raises(UserError, match=r"^experiments\.figures\.figure2 failed: .* has no CSV"):
        sol_jax.run_program("experiments.figures.figure2", results="docs")
    assert capfd.readouterr().out == ""  # a notebook shows the error, once


def test_lines_that_look_like_errors_are_heard_too(tmp_path, monkeypatch, capfd):
    (tmp_path / "talks.py").write_text("print('a', 'error: b', 'error: c', 'd', 'error: e', sep=chr(10))")
    monkeypatch.chdir(tmp_path)
    said = sol_jax.run_program("talks")
    assert said == capfd.readouterr().out == "a\nerror: b\nerror: c\nd\nerror: e\n"


@pytest.mark.parametrize(
    "error", [UserError("give --workdir"), UnavailableError("attend", "native", "run", "of this", "xla")]
)
def test_a_notebook_shows_the_sentence_in_place_of_a_traceback(error):
    """IPython asks an exception for this before it makes a traceback; `make notebooks` sees that it does."""
    assert error._render_traceback_() == [f"error: {error}"]


def test_a_training_that_is_stopped_by_hand_shows_no_traceback_in_a_notebook(monkeypatch, tmp_path):
    """Under a notebook's button for that; scripts see an interrupt as ever."""

    def stopped(config, workdir):
        raise KeyboardInterrupt

    monkeypatch.setattr(from_config, "train", stopped)
    with pytest.raises(KeyboardInterrupt) as stop:
        sol_jax.train_policy(RunConfig(), tmp_path)
    assert stop.value._render_traceback_() == [
        f"stopped; run it again to go on from the last checkpoint in {tmp_path}"
    ]
