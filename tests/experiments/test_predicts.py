"""Correlations of rewards on text with what comes of tasks, and policies paired by prompt."""

import csv

import numpy as np
import pytest

from experiments.figures import plots
from experiments.studies import paired, predicts
from sol_jax.errors import UserError


def row_of(controller, budget, run="runs/fl", **fields):
    given = {"run": run, "controller": controller, "held": "", "requested_kappa": budget, **fields}
    return plots.ResultRow("file", "0", given)


def test_ranks_share_the_mean_of_ties():
    np.testing.assert_allclose(predicts.ranks(np.array([3.0, 1.0, 3.0, 2.0])), [2.5, 0.0, 2.5, 1.0])


def test_points_are_joined_by_run_controller_and_budget():
    """Twice as much accuracy as log-probability, with an evaluation that no task has."""
    nats = {("policy", 0.3): 3.0, ("policy", 0.6): 2.0, ("fixed", 0.3): 3.4, ("fixed", 0.6): 2.2}
    text = [row_of(c, b, run="fl", nats=n) for (c, b), n in nats.items()]
    text += [row_of("policy", 0.9, run="fl", nats=1.0), row_of("dense", 0.3, run="fl", nats=0.5)]
    tasks = [
        row_of(c, b, task=task, accuracy=1 - shift - n / 5, nats=float(n))
        for (c, b), n in nats.items()
        for task, shift in (("piqa", 0.0), ("arc_easy", 0.2))
    ]
    tasks.append(row_of("dense", 0.3, task="piqa", accuracy=0.0, nats=9.0))
    tasks.append(row_of("policy", 0.3, run="runs/other", task="piqa", accuracy=1.0, nats=9.0))
    tasks.append(row_of("policy", 0.3, run="runs/other", task="arc_easy", accuracy=1.0, nats=9.0))
    tasks.append(
        row_of("policy", 0.3, run="fl", task="winogrande", accuracy=0.1, nats=9.0)
    )  # not all have it
    # Answers that are written are no choices, and not all runs have them.
    tasks.append(row_of("policy", 0.3, run="fl", task="gsm8k_answers", accuracy=0.9, nats=9.0))
    found = {(r["task"], r["measure"]): r for r in predicts.predicts(text, tasks)}
    assert set(found) == {
        (task, measure) for task in ("piqa", "arc_easy") for measure in ("accuracy", "logp")
    } | {(predicts.CHOICE, "accuracy")}
    row = found[predicts.CHOICE, "accuracy"]
    assert (row["points"], row["runs"]) == (4, 1)
    assert row["pearson"] == row["spearman"] == pytest.approx(1)
    assert row["within"] == pytest.approx(1)


def test_within_budgets_a_trend_with_compute_does_not_count():
    points = {("fl", c, (b,)): (b + d, b - d) for b in (0.0, 1.0) for c, d in (("a", 0.1), ("b", -0.1))}
    row = predicts.correlations(points)
    assert row["pearson"] > 0.9
    assert row["within"] == pytest.approx(-1)


def test_nothing_in_common_is_refused():
    text = [row_of("policy", 0.3, nats=1.0)]
    with pytest.raises(UserError, match=r"at the\s+same --budgets"):
        predicts.predicts(text, [row_of("policy", 0.4, task="piqa", accuracy=0.5, nats=1.0)])


def prompt(policy, index, logp, mode="refresh", budget="0.5", **fields):
    measures = dict.fromkeys(paired.MEASURES, "1") | {"logp": str(logp)} | fields
    return {"policy": policy, "mode": mode, "controller": "policy", "requested_kappa": budget,
            "index": str(index), **measures}  # fmt: skip


def test_policies_are_paired_by_prompt_mode_and_budget(tmp_path):
    """B is 0.5 better on both prompts that both policies have."""
    rows = [prompt("A", 0, -2.0), prompt("A", 1, -4.0), prompt("A", 0, -9.0, mode="lossless")]
    rows += [prompt("B", 1, -3.5), prompt("B", 0, -1.5), prompt("B", 2, -7.0)]
    rows += [prompt("B", 0, 0.0, budget="0.9"), prompt("B", 0, 0.0, mode="plain"), prompt("A", 2, "nan")]
    source, output = tmp_path / "t-prompts.csv", tmp_path / "paired.csv"
    with source.open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    paired.main(["--prompts", str(source), "--baseline", "A", "--output", str(output)])
    found = list(csv.DictReader(output.open()))
    assert {row["measure"] for row in found} == set(paired.MEASURES)
    assert {(row["policy"], row["mode"], row["budget"]) for row in found} == {("B", "refresh", "0.5")}
    row = next(row for row in found if row["measure"] == "logp")
    assert [float(row[name]) for name in ("change", "change_low", "change_high")] == [0.5, 0.5, 0.5]
    assert row["prompts"] == "2"
    with pytest.raises(UserError, match="must be one of at least two policies: A, B"):
        paired.paired(rows, "C")


def test_a_policy_is_paired_with_the_fixed_schedule_of_its_cost():
    """Per policy, mode and budget: 1 better on one prompt, 2 on the other; what one side lacks is left."""
    rows = [
        prompt("A", 0, -2.0),
        prompt("A", 1, -4.0),
        prompt("A", 2, -4.0),
        prompt("A", 0, 1.0, budget="0.9"),
    ]
    rows += [prompt("A", 0, -3.0) | {"controller": "fixed"}, prompt("A", 1, -6.0) | {"controller": "fixed"}]
    rows += [prompt("B", 0, -1.0, mode="lossless"), prompt("B", 0, 0.0) | {"controller": "fixed"}]
    found = [row for row in paired.against(rows, "fixed") if row["measure"] == "logp"]
    assert [(row["policy"], row["mode"], row["budget"], row["prompts"]) for row in found] == [
        ("A", "refresh", "0.5", 2)
    ]
    assert (found[0]["change"], found[0]["change_low"], found[0]["change_high"]) == (1.5, 1.0, 2.0)
    with pytest.raises(UserError, match="--against=random was run at no mode and budget of a policy"):
        paired.against(rows, "random")
