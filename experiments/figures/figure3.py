"""Figure 3: how far ahead a policy plans: all levels at horizons of 4, 16 and 64 steps.

    python -m experiments.figures.figure3

Reads `sol-j-fl-t4-s*.csv`, `sol-j-fl-t16-s*.csv` and `sol-j-fl-t64-s*.csv` of SmolLM2-135M, and writes
`docs/figures/figure3.png`.
"""

import pathlib

from matplotlib.figure import Figure

from experiments.figures import plots

RUNS = {f"sol-j-fl-t{T}": f"FL, T = {T}" for T in (4, 16, 64)}


def draw(folder: pathlib.Path) -> Figure:
    return plots.fronts(plots.panels(folder, RUNS))


if __name__ == "__main__":
    plots.run("figure3", draw, __doc__)
