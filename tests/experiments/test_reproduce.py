"""The end-to-end experiment: what it estimates, and one run of it on the tiny model."""

import re

import pytest
import tiny
from in_process import run_program

from configs import default
from experiments import reproduce
from sol_jax.costs import update as flops
from sol_jax.errors import UserError
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.options import EvaluateOptions
from sol_jax.training import estimate


@pytest.fixture
def config(tiny_folder):
    return tiny.config_for(tiny_folder)


def test_entries_by_hand(config, tiny_session):
    """2 budgets on the diagonal and 2 along each axis, three controllers each; dense once, draws at one."""
    controllers = ("fixed", "random", "entropy")
    options = EvaluateOptions(grid=2, controllers=controllers, num_random=7, random_budgets=1)
    setup = tiny_session.setup
    assert estimate.entries_of(options, config, setup) == 1 + 8 * 3 + 7
    assert len(options.plan(config, setup).budgets) == 8


def test_evaluation_operations_are_those_of_a_rollout(tiny_session):
    """As many as an update's with K = entries, without its policy's share; the prefill does not grow."""
    setup = tiny_session.setup
    K = setup.grpo.num_schedules
    parts = flops.update_flops(setup, 3)
    one = estimate.evaluation_flops(setup, 3, K)
    assert one == parts["prefill"] + parts["rollout"] + parts["head"]
    assert estimate.evaluation_flops(setup, 3, 2 * K) - one == parts["rollout"] + parts["head"]


def test_the_estimate(config, tiny_session, monkeypatch):
    """Twice the updates take twice as long; at a rate of one operation per second it is their number."""
    monkeypatch.setattr(estimate, "matmul_rate", lambda dtype: 1.0 / estimate.SHARE)
    config = config.with_fields({"eval.every": 0})
    setup = config.setup(tiny_session.setup.model)
    options = EvaluateOptions(num_blocks=4)
    seconds = estimate.estimated_seconds(config, setup, 10, options)
    assert seconds["training"] == pytest.approx(10 * sum(flops.update_flops(setup, 2).values()))
    assert estimate.estimated_seconds(config, setup, 20, options)["training"] == 2 * seconds["training"]
    twice = estimate.estimated_seconds(config, setup, 10, EvaluateOptions(num_blocks=8))
    assert twice["evaluation"] == 2 * seconds["evaluation"]
    validated = config.with_fields({"eval.every": 5})
    assert estimate.estimated_seconds(validated, setup, 10, options)["training"] > seconds["training"]


def test_words():
    assert estimate.clock(0.5) == "1 min"
    assert estimate.clock(3599) == "60 min"
    assert estimate.clock(9000) == "2.5 h"
    assert reproduce.name_of("configs/sol_j_fl.py:cpu,t4") == "sol_j_fl-cpu-t4"
    assert reproduce.name_of("configs/demo.py") == "demo"
    assert reproduce.name_of("configs/single_axis.py:kappa-0.1,cpu") == "single_axis-kappa-0.1-cpu"


def test_only_the_time(config, tmp_path, capsys):
    """Nothing is written."""
    config = config.with_fields({"train.num_updates": 0})  # one pass: as many as the text has
    reproduce.reproduce(config, tmp_path / "run", EvaluateOptions(num_blocks=3), seconds_only=True)
    shown = capsys.readouterr().out
    assert re.match(r"this will take about \d+ min here: \d\d updates \d+ min, evaluation 1 min", shown)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (EvaluateOptions(source="nowhere.txt", num_blocks=2), {}),
        (EvaluateOptions(num_blocks=2), {"data.test_fraction": 0.0}),
    ],
)
def test_a_test_text_that_is_not_there_is_told_before_the_training(
    tiny_folder, tmp_path, monkeypatch, options, fields
):
    monkeypatch.setattr(reproduce, "train", lambda *_: pytest.fail("it trains"))
    with pytest.raises(UserError, match=r"nowhere\.txt|test_fraction"):
        reproduce.reproduce(tiny.config_for(tiny_folder, **fields), tmp_path, options, seconds_only=False)


@pytest.mark.slow
def test_one_experiment_end_to_end(tiny_folder, tmp_path):
    """Says how long, trains, evaluates and draws; started again nothing is repeated."""
    config = tiny.config_for(tiny_folder, **{"train.num_updates": 2, "eval.num_blocks": 2})
    flags = tiny.flags_for(config, default.get_config("smoke"))
    command = [
        "experiments.reproduce", "--config", "configs/default.py:smoke", *flags,
        "--workdir", str(tmp_path / "run"), "--grid", "1", "--num_random", "2", "--num_blocks", "3",
        "--controllers", "fixed,random,drift",
    ]  # fmt: skip

    def ended():
        done = run_program(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = ended()
    assert shown.startswith("this will take about 1 min here: 2 updates 1 min, evaluation 1 min")
    assert "evaluating the policy of update 2" in shown
    rows = results.read(tmp_path / "run" / "results.csv")
    assert {row["controller"] for row in rows} == {
        "policy",
        "fixed",
        "random",
        "random_best",
        "drift",
        "dense",
    }
    assert (tmp_path / "run" / "front.png").read_bytes().startswith(b"\x89PNG")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("batch-*.npz")}
    assert stamps
    assert ended() == shown
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
