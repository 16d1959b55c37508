"""Figure 4: does the policy keep to its budget?  It shows requested against realised cost, axis by axis.

    python -m experiments.figures.figure4

Reads `sol-j-2l-s*.csv`, `sol-j-3l-s*.csv` and `sol-j-fl-t16-s*.csv` of SmolLM2-135M, and writes
`docs/figures/figure4.png`.  Lines are sweeps of one axis with the others in the middle of their ranges, dots
are all other budgets; the grey band is the target of this project, 0.03 to either side.
"""

import pathlib

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.figures import plots
from experiments.figures.figure2 import RUNS

TOLERANCE = 0.03


def draw(folder: pathlib.Path) -> Figure:
    runs = plots.available(folder, RUNS)
    panels = {title: plots.load(folder, f"{plots.MODEL}/{name}-s*") for name, title in runs.items()}
    figure, grid = plt.subplots(
        len(panels), 3, figsize=(9.6, 3.1 * len(panels) + 0.5), layout="constrained", squeeze=False
    )
    for line, (title, rows) in zip(grid, panels.items(), strict=True):
        mine = [row for row in rows if row.controller == "policy" and not row.held]
        for axes, (name, color) in zip(line, plots.AXIS_COLORS.items(), strict=True):
            _draw_axis(axes, mine, name, color)
            axes.set_title(f"{title}: {name}", fontsize=9)
        line[0].set_ylabel("realised cost (episode average)")
    for axes in grid[-1]:
        axes.set_xlabel("requested cost")
    return plots.finish(figure, grid[0, 0], [row for rows in panels.values() for row in rows])


def _draw_axis(axes: plt.Axes, rows: list[plots.ResultRow], name: str, color: str) -> None:
    ends = np.array([0.0, 1.02])
    axes.fill_between(ends, ends - TOLERANCE, ends + TOLERANCE, color="0.88", label="within 0.03")
    axes.plot(ends, ends, color="black", linewidth=0.8, linestyle=":")
    requested = [row.fields[f"requested_{name}"] for row in rows]
    others = [row for row in rows if row.along != name]
    pair = (f"requested_{name}", f"cost_{name}")
    axes.plot(
        *([row.fields[field] for row in others] for field in pair),
        ".",
        color=color,
        alpha=0.35,
        label="other budgets",
    )
    label = "this axis swept"
    for seed in sorted({row.seed for row in rows}):
        swept = sorted(
            tuple(row.fields[field] for field in pair)
            for row in rows
            if row.along == name and row.seed == seed
        )
        if swept:
            axes.plot(
                *zip(*swept, strict=True),
                "o-",
                color=color,
                markersize=3.5,
                linewidth=1,
                label=label,
            )
            label = ""  # once
    miss = np.abs([row.fields[pair[1]] - row.fields[pair[0]] for row in rows])
    axes.text(0.97, 0.04, f"largest miss {miss.max():.3f}", transform=axes.transAxes, ha="right", fontsize=7)
    low = min(requested) - 0.05
    axes.set(xlim=(low, 1.02), ylim=(low, 1.05))


if __name__ == "__main__":
    plots.run("figure4", draw, __doc__)
