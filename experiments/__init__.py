"""Programs on top of `sol_jax`: figures, benchmarks, studies of our own, downstream tasks, and their results."""

import pathlib

RESULTS = pathlib.Path(__file__).parent / "results"
FIGURES = pathlib.Path(__file__).parents[1] / "docs" / "figures"
