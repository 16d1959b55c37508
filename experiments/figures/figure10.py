"""Figure 10: the policy beside handcrafted controllers of the same cost: entropy, drift, higher levels first.

    python -m experiments.figures.figure10

Reads `sol-j-2l-s*.csv`, `sol-j-3l-s*.csv` and `sol-j-fl-t16-s*.csv` of SmolLM2-135M, and writes
`docs/figures/figure10.png`.
"""

import pathlib

from matplotlib.figure import Figure

from experiments.figures import plots
from experiments.figures.figure2 import RUNS


def draw(folder: pathlib.Path) -> Figure:
    controllers = ("fixed", "fixed_official", "front", "entropy", "drift", "drift_official")
    return plots.fronts(plots.panels(folder, RUNS), controllers)


if __name__ == "__main__":
    plots.run("figure10", draw, __doc__)
