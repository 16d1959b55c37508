"""Figure 11: controllers of one axis with two levels, beside fixed and random schedules of the same cost.

    python -m experiments.figures.figure11

Reads `kappa-0.1-s*.csv` ... `eta-6-16-s*.csv` of SmolLM2-135M, as many of the nine as there are, and writes
`docs/figures/figure11.png`.  The other two axes are dense, so the cost of the one axis is shown, not the net
keep rate.
"""

import pathlib

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from configs.single_axis import LEVELS
from experiments.figures import plots

CONTROLLERS = ("policy", "fixed", "random", "random_best")


def draw(folder: pathlib.Path) -> Figure:
    runs = plots.available(folder, {name: name for name in LEVELS})
    by_axis = {axis: [name for name in runs if LEVELS[name][0] == axis] for axis in plots.AXIS_COLORS}
    by_axis = {axis: names for axis, names in by_axis.items() if names}
    shape = len(by_axis), 2 * max(map(len, by_axis.values()))
    size = plots.wide(shape[1], 2.6 * shape[0] + 0.6)
    figure, grid = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    everything: list[plots.ResultRow] = []
    for line, (axis, names) in zip(grid, by_axis.items(), strict=True):
        for name, left, right in zip(names, line[::2], line[1::2], strict=False):
            rows = plots.front_rows(plots.load(folder, f"{plots.MODEL}/{name}-s*"))
            everything += rows
            _draw_set(left, right, rows, axis, LEVELS[name][1])
        for axes in line[2 * len(names) :]:
            axes.set_visible(False)
    return plots.finish(figure, grid[0, 0], everything)


def _draw_set(
    left: plt.Axes, right: plt.Axes, rows: list[plots.ResultRow], axis: str, levels: tuple[float, float]
) -> None:
    plots.draw(left, rows, CONTROLLERS, "perplexity", f"cost_{axis}")
    dense = next(row.perplexity for row in rows if row.controller == "dense")
    left.axhline(dense, color="black", linewidth=0.8, linestyle=":", label="dense")
    plots.draw(right, rows, CONTROLLERS[1:], "gain", f"cost_{axis}")
    right.axhline(0, color="black", linewidth=0.8)
    title = f"{axis}: {levels[0]:g} or {levels[1]:g}"
    left.set(title=title, ylabel="perplexity", xlabel=f"realised cost of {axis}")
    right.set(title=title, ylabel="gain of the policy, nats/token", xlabel=f"realised cost of {axis}")


if __name__ == "__main__":
    plots.run("figure11", draw, __doc__)
