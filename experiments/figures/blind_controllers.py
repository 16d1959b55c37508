"""Beyond the paper: what policies gain by looking at the text.

    python -m experiments.figures.blind_controllers

Reads `NAME-s*.csv` of SmolLM2-135M for the names in `RUNS`, which `sol_jax.evaluate` wrote with
`--controllers fixed,clock,swapped`, and writes `docs/figures/blind_controllers.png`.  Three controllers of
the policy's cost are shown: the fixed schedule, and two that know all of the policy but the text.  `clock`
has its mean costs at each step of the episode; `swapped` plays its own schedules, each to another text.
"""

import pathlib

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.figures import plots
from sol_jax.errors import UserError

CONTROLLERS = ("fixed", "clock", "swapped")
RUNS = {
    "sol-j-2l": "2L",
    "sol-j-3l": "3L",
    "sol-j-fl-t16": "FL, T = 16",
    "sol-j-fl-t16-askleft": "FL, asked for what is left",
    "sol-j-fl-t16-page": "FL, sees the newest page",
    "sol-j-fl-t16-protect": "FL, sinks and window protected",
    "sol-j-fl-t4": "FL, T = 4",
    "sol-j-fl-t64": "FL, T = 64",
    "sol-j-fl-t64-page": "FL, T = 64, sees the newest page",
    "kappa-0.2": "kappa alone",
    "rho-0.4": "rho alone",
    "reasoning": "kappa alone, T = 64, pages of 16",
}
COLUMNS = 4


def draw(folder: pathlib.Path) -> Figure:
    panels = {
        title: [row for row in rows if row.controller in (*CONTROLLERS, "policy")]
        for title, rows in plots.panels(folder, RUNS).items()
        if any(row.controller == "swapped" for row in rows)
    }
    if not panels:
        raise UserError(
            f"no CSV in {folder / plots.MODEL} has swapped schedules; evaluate with "
            f"--controllers {','.join(CONTROLLERS)}"
        )
    lines = -(-len(panels) // COLUMNS)
    figure, grid = plt.subplots(
        lines, COLUMNS, figsize=plots.wide(COLUMNS, 2.8 * lines + 0.8), layout="constrained", squeeze=False,
        sharex=True, sharey=True,
    )  # fmt: skip
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, rows) in zip(grid.flat, panels.items(), strict=False):
        plots.draw(axes, rows, CONTROLLERS, "gain")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(title, fontsize=9)
    for axes in grid.flat[max(0, len(panels) - COLUMNS) : len(panels)]:  # the lowest of every column
        axes.set_xlabel(plots.NET)
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("gain of the policy,\nnats per token")
    return plots.finish(figure, grid[0, 0], [row for rows in panels.values() for row in rows])


if __name__ == "__main__":
    plots.run("blind_controllers", draw, __doc__)
