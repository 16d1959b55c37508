"""Figure 2: quality against compute with two, three and all levels per axis.

    python -m experiments.figures.figure2

Reads `sol-j-2l-s*.csv`, `sol-j-3l-s*.csv` and `sol-j-fl-t16-s*.csv` of SmolLM2-135M, and writes
`docs/figures/figure2.png`.
"""

import pathlib

from matplotlib.figure import Figure

from experiments.figures import plots

RUNS = {"sol-j-2l": "2L, 8 actions", "sol-j-3l": "3L, 27 actions", "sol-j-fl-t16": "FL, 1,560 actions"}


def draw(folder: pathlib.Path) -> Figure:
    return plots.fronts(plots.panels(folder, RUNS))


if __name__ == "__main__":
    plots.run("figure2", draw, __doc__)
