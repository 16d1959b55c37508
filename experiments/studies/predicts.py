"""Does the likelihood of given text, the reward of training, predict what a policy does on tasks?

    python -m experiments.studies.predicts --evaluations experiments/results/smollm2-135m/sol-j-*.csv \\
        --tasks experiments/results/smollm2-135m/downstream-*.csv --output experiments/results/predicts.csv

A point is a controller at a requested budget of a run.  It has a mean log-probability per token on text (from
CSVs of `sol_jax.evaluate`) and, on each task, an accuracy and the log-probability of right answers (from CSVs
of `experiments.tasks.downstream`).  Dense decoding, which is the same at every budget, is no point.  Points
are joined by run, controller and requested budget, so evaluate both at the same budgets.

The CSV has one row per task and measure: Pearson's and Spearman's correlation over the points, with 95 %
intervals, bootstrapped over points.  `within` is Pearson's once the mean over the controllers of each run and
budget is taken off both, which leaves out that everything gets better with more compute.
"""

import argparse
import pathlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.figures import plots
from experiments.tasks import prompts
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.statistics import document_correlation
from sol_jax.files import path_argument

CHOICE = "multiple_choice"  # the mean over the tasks with choices that all runs have
PointKey = tuple[str, str, tuple[float, ...]]  # run, controller, requested budget


def point_key(row: plots.ResultRow) -> PointKey:
    """What joins a row of text with rows of tasks; policies go by the last part of their name."""
    asked = tuple(round(float(cost), 6) for cost in row.per_axis("requested"))
    return pathlib.PurePath(str(row.fields["run"])).name, str(row.controller), asked


def text_scores(rows: Sequence[plots.ResultRow]) -> dict[PointKey, float]:
    """Mean log-probability per token on text."""
    return {point_key(row): -float(row.nats) for row in rows if not row.held and row.controller != "dense"}


def task_scores(rows: Sequence[plots.ResultRow]) -> dict[tuple[str, str], dict[PointKey, float]]:
    """(task, measure) -> point -> score, higher is better; accuracies also as a mean over tasks."""
    found: dict[tuple[str, str], dict[PointKey, float]] = defaultdict(dict)
    accuracies: dict[PointKey, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if isinstance(row.fields.get("nats"), float):
            found[row.task, "logp"][point_key(row)] = -row.nats
        if isinstance(row.fields.get("accuracy"), float):
            found[row.task, "accuracy"][point_key(row)] = row.accuracy
            if row.task in prompts.TASKS and not prompts.TASKS[row.task].free:
                accuracies[point_key(row)][row.task] = row.accuracy
    common = set[str]().union(*accuracies.values()).intersection(*accuracies.values())
    if common:
        found[CHOICE, "accuracy"] = {
            at: float(np.mean([of[task] for task in common])) for at, of in accuracies.items()
        }
    return found


def ranks(x_N: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    _, which_N, count = np.unique(x_N, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[which_N]


def correlations(points: dict[PointKey, tuple[float, float]]) -> dict[str, Any]:
    """Columns of one row: Pearson, Spearman and the correlation within budgets."""
    x_N, y_N = np.array(list(points.values())).T
    budget_N = np.unique([f"{run} {asked}" for run, _, asked in points], return_inverse=True)[1]

    def centred(v_N: np.ndarray) -> np.ndarray:
        return v_N - (np.bincount(budget_N, v_N) / np.bincount(budget_N))[budget_N]

    each_N = np.arange(len(x_N))
    kinds = {
        "pearson": document_correlation(x_N, y_N, each_N),
        "spearman": document_correlation(ranks(x_N), ranks(y_N), each_N),
        "within": document_correlation(centred(x_N), centred(y_N), budget_N),
    }
    found: dict[str, Any] = {"points": len(points), "runs": len({run for run, _, _ in points})}
    for name, estimate in kinds.items():
        found |= dict(zip((name, f"{name}_low", f"{name}_high"), estimate, strict=True))
    return found


def predicts(text: Sequence[plots.ResultRow], tasks: Sequence[plots.ResultRow]) -> list[dict[str, Any]]:
    """The rows of the CSV; `UserError` if too few points are in both."""
    known, found = text_scores(text), []
    for (task, measure), scores in sorted(task_scores(tasks).items()):
        points = {at: (known[at], score) for at, score in scores.items() if at in known}
        if len(points) > 2:
            found.append({"task": task, "measure": measure, **correlations(points)})
    if not found:
        raise UserError(
            "fewer than three (run, controller, budget) are in both kinds of CSV; evaluate text and tasks at "
            "the same --budgets"
        )
    return found


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=path_argument, nargs="+", required=True, help="CSVs on text")
    parser.add_argument("--tasks", type=path_argument, nargs="+", required=True, help="CSVs on tasks")
    parser.add_argument("--output", type=path_argument, required=True, help="CSV to write")
    args = parser.parse_args(argv)
    text, tasks = (
        [row for path in paths for row in plots.read(path)] for paths in (args.evaluations, args.tasks)
    )
    found = predicts(text, tasks)
    results.write(args.output, [results.texts(row) for row in found])
    for row in found:
        print(
            f"{row['task']:24} {row['measure']:9} r = {row['pearson']:+.2f} "
            f"[{row['pearson_low']:+.2f}, {row['pearson_high']:+.2f}] over {row['points']} points"
        )


if __name__ == "__main__":
    main()
