"""Programs on top of `sol_jax`: figures, benchmarks, studies, downstream tasks, and what they wrote."""

import pathlib

RESULTS = pathlib.Path(__file__).parent / "results"
FIGURES = pathlib.Path(__file__).parents[1] / "docs" / "figures"
