"""Figure 5: model sizes.  All levels at T = 16, with a panel per model that was evaluated.

    python -m experiments.figures.figure5

Reads `sol-j-fl-t16-s*.csv` of every model under `experiments/results`, and writes `docs/figures/figure5.png`.
"""

import pathlib

from matplotlib.figure import Figure

from experiments.figures import plots
from sol_jax.errors import UserError


def draw(folder: pathlib.Path) -> Figure:
    models = sorted({path.parent.name for path in folder.glob("*/sol-j-fl-t16-s*.csv")})
    if not models:
        raise UserError(f"{folder} has no CSV named */sol-j-fl-t16-s*; evaluate the runs first")
    return plots.fronts(
        {model: plots.front_rows(plots.load(folder, f"{model}/sol-j-fl-t16-s*")) for model in models}
    )


if __name__ == "__main__":
    plots.run("figure5", draw, __doc__)
