"""Draws every figure whose CSVs are there, and says which are not: `make figures`.

    python -m experiments.figures

Reads the CSVs under `experiments/results` and writes `docs/figures/NAME.png`.  It takes no options.
"""

import importlib
import pathlib
import sys
from collections.abc import Sequence

from experiments import FIGURES, RESULTS
from experiments.figures import plots
from sol_jax.errors import UserError

NAMES = (
    *(f"figure{number}" for number in range(2, 12)),
    "blind_controllers",
    "quest_pages",
    "generation",
    "clock",
)
PICTURES = ("shaded_text",)  # of the README: nothing that was measured


def draw_all(results: pathlib.Path, figures: pathlib.Path, names: Sequence[str] = NAMES) -> dict[str, str]:
    """Draws the figures; returns why others were not drawn."""
    missing = {}
    for name in names:
        try:
            figure = importlib.import_module(f"experiments.figures.{name}").draw(results)
        except UserError as error:
            missing[name] = str(error)
        else:
            print(f"drew {plots.save(figure, figures / f'{name}.png')}")
    return missing


if __name__ == "__main__":
    for name, why in draw_all(RESULTS, FIGURES, (*NAMES, *PICTURES)).items():
        print(f"{name} is not drawn: {why}", file=sys.stderr)
