"""Figure 8: the policy in the cloud of random schedules of the same cost.

    python -m experiments.figures.figure8

Reads CSVs of `sol-j-2l`, `sol-j-3l` and `sol-j-fl-t16` of SmolLM2-135M: of each `NAME-random-s*.csv` or else
`NAME-s*.csv`, and the draws beside them (`-draws.csv`).  Writes `docs/figures/figure8.png`, in which each
grey dot is one schedule over the whole text.
"""

import pathlib

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.figures import plots
from experiments.figures.figure2 import RUNS

SPAN = 0.05  # of net keep rates that a panel shows, at least


def draw(folder: pathlib.Path) -> Figure:
    runs = plots.with_random_schedules(folder, RUNS)
    figure, line = plt.subplots(
        1, len(runs), figsize=plots.wide(len(runs), 4.2), layout="constrained", squeeze=False
    )
    everything: list[plots.ResultRow] = []
    for axes, (name, title) in zip(line[0], runs.items(), strict=True):
        rows = plots.front_rows(plots.load(folder, f"{plots.MODEL}/{name}-s*"))
        everything += rows
        drawn = plots.random_schedules(folder, f"{plots.MODEL}/{name}-s*")
        asked = {row.per_axis("requested") for row in rows}
        drawn = [row for row in drawn if row.per_axis("requested") in asked]
        cloud = ([row.net for row in drawn], [row.perplexity for row in drawn])
        axes.plot(*cloud, ".", color="0.7", markersize=2.5, label="random schedules", zorder=1)
        plots.draw(axes, rows, ("policy", "fixed"), "perplexity")
        plots.draw(axes, rows, ("random_best",), "perplexity", linestyle="none")
        axes.set(title=title, xlabel=plots.NET, yscale="log")
        # At one budget all costs are the same but for rounding, which must not fill the panel.
        left, right = axes.get_xlim()
        axes.set_xlim(min(left, (left + right - SPAN) / 2), max(right, (left + right + SPAN) / 2))
        axes.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axes.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.6)))
    line[0, 0].set_ylabel("perplexity")
    return plots.finish(figure, line[0, 0], everything)


if __name__ == "__main__":
    plots.run("figure8", draw, __doc__)
