"""Draws every figure whose CSVs are there, and says which are not: `make figures`."""

import importlib
import pathlib
import sys

from experiments import plots
from sol_jax.errors import UserError

NUMBERS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11)


def draw_all(results: pathlib.Path, figures: pathlib.Path) -> dict[int, str]:
    """Draws the figures; returns why others were not drawn."""
    missing = {}
    for number in NUMBERS:
        name = f"figure{number}"
        try:
            figure = importlib.import_module(f"experiments.{name}").draw(results)
        except UserError as error:
            missing[number] = str(error)
        else:
            print(f"drew {plots.save(figure, figures / f'{name}.png')}")
    return missing


if __name__ == "__main__":
    for number, why in draw_all(plots.RESULTS, plots.FIGURES).items():
        print(f"figure {number} is not drawn: {why}", file=sys.stderr)
