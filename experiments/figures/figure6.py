"""Figure 6: downstream tasks.  The policy stands beside fixed schedules of the same cost and dense decoding.

    python -m experiments.figures.figure6

Reads `downstream-sol-j-fl-t16-page-s*.csv` and `downstream-reasoning-s*.csv` of SmolLM2-135M, which
`experiments.tasks.downstream` wrote, and writes `docs/figures/figure6.png`.  The upper panels are the paper's
three: the mean accuracy of three tasks, that of three MMLU subjects, and GSM8K with token sparsity alone, by
the likelihood of its reference solutions (right answers are rare from a model so small).  The lower panels
show tasks one by one.  Bars are 95 % intervals: Wilson's of a task; for a mean of tasks their root mean
square over their number; for nats the bootstrap of what the policy gains over that controller.
"""

import pathlib
from collections import defaultdict
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import plots
from experiments.tasks.prompts import SUBJECTS
from sol_jax.errors import UserError

JOINT, REASONING = "downstream-sol-j-fl-t16-page", "downstream-reasoning"
CONTROLLERS = ("policy", "fixed", "random_best")
COMMON = ("arc_easy", "piqa", "winogrande")
MMLU = tuple(f"mmlu_{subject}" for subject in SUBJECTS)
PANELS = {  # title: whose CSVs, tasks
    "mean of ARC-Easy, PIQA, WinoGrande": (JOINT, COMMON),
    "mean of three MMLU subjects": (JOINT, MMLU),
    "GSM8K, token sparsity alone": (REASONING, ("gsm8k",)),
    "ARC-Easy": (JOINT, ("arc_easy",)),
    "PIQA": (JOINT, ("piqa",)),
    "WinoGrande": (JOINT, ("winogrande",)),
}


def points(rows: Sequence[plots.ResultRow], tasks: Sequence[str], controller: str) -> list[plots.Point]:
    """The mean over tasks (and seeds) at every budget at which all of them were run, in ascending order."""
    measure = "nats" if tasks == ("gsm8k",) else "accuracy"
    by_run = defaultdict(list)
    for row in rows:
        if row.task in tasks and row.controller == controller:
            by_run[row.per_axis("requested"), row.seed].append(row)
    by_budget = defaultdict(list)
    for (budget, _), same in by_run.items():
        if len(same) == len(tasks):
            by_budget[budget].append(_mean(same, measure))
    return sorted(plots.Point(*np.mean(points, 0).tolist()) for points in by_budget.values())


def _mean(same: Sequence[plots.ResultRow], measure: str) -> plots.Point:
    """One controller at one budget over several tasks."""
    x, y = (float(np.mean([row.fields[name] for row in same])) for name in ("net", measure))
    if measure == "nats":
        # The policy's gain is this controller's nats less its own: the bar is its interval, around them.
        (row,) = same
        return plots.Point(x, y, y + row.gain_low - row.gain, y + row.gain_high - row.gain)
    ends = [(row.accuracy - row.accuracy_low, row.accuracy_high - row.accuracy) for row in same]
    below, above = np.sqrt(np.sum(np.square(ends), 0)) / len(same)
    return plots.Point(x, y, float(y - below), float(y + above))


def _draw_panel(axes: Axes, rows: Sequence[plots.ResultRow], title: str, tasks: Sequence[str]) -> None:
    for controller in CONTROLLERS:
        line = points(rows, tasks, controller)
        if line:
            x, y, low, high = np.array(line).T
            looks = plots.STYLES[controller] | {"linewidth": 1.2, "markersize": 4.5, "capsize": 2}
            axes.errorbar(x, y, yerr=[y - low, high - y], **looks)
    dense = points(rows, tasks, "dense")
    if dense:
        axes.axhline(dense[0].y, color="black", linewidth=0.8, linestyle=":", label="dense")
    else:
        axes.text(0.5, 0.5, "not run", ha="center", transform=axes.transAxes)
    axes.set(title=title, ylabel="nats per token" if tasks == ("gsm8k",) else "accuracy")
    axes.title.set_fontsize(9)


def draw(folder: pathlib.Path) -> Figure:
    by_name = {name: _rows(folder, name) for name in (JOINT, REASONING)}
    if not any(by_name.values()):
        raise UserError(
            f"{folder / plots.MODEL} has no CSV named {JOINT}-s* or {REASONING}-s*; "
            "run experiments.tasks.downstream first"
        )
    figure, grid = plt.subplots(2, 3, figsize=(10.8, 6.4), layout="constrained")
    for axes, (title, (name, tasks)) in zip(grid.flat, PANELS.items(), strict=True):
        _draw_panel(axes, by_name[name], title, tasks)
    for axes in grid[1]:
        axes.set_xlabel(plots.NET)
    handles = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in grid.flat]
    drawn = {label: line for each in handles for line, label in each}  # not every task has all controllers
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    rows = [row for part in by_name.values() for row in part]
    items = sorted({int(row.items) for row in rows})
    said = f"{items[0]} items" if len(items) == 1 else f"{items[0]} to {items[-1]} items"
    figure.suptitle(
        f"{plots.MODEL}, T={'/'.join(sorted({f'{row.horizon:.0f}' for row in rows}))}, "
        f"{said} of each task; bars: 95 % over items",
        fontsize=8,
    )
    return figure


def _rows(folder: pathlib.Path, name: str) -> list[plots.ResultRow]:
    there = any((folder / plots.MODEL).glob(f"{name}-s[0-9]*.csv"))
    return plots.load(folder, f"{plots.MODEL}/{name}-s*") if there else []


if __name__ == "__main__":
    plots.run("figure6", draw, __doc__)
