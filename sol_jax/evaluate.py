"""How good a policy is at requested budgets, beside schedules and heuristics of the same cost.

    python -m sol_jax.evaluate --workdir RUN            # scores RUN's best checkpoint on its test split
    python -m sol_jax.evaluate --policy smollm2-135m/sol-j-fl --output wikitext2.csv \\
        --source data/wiki.test.raw.gz --document_start '^ = [^=].* = $' \\
        --grid 20 --num_random 500 --random_budgets 6 --controllers fixed,random,entropy,drift

writes one CSV row per (controller, requested budget) and prints them as a table; every random schedule has
a row in a second CSV.  Killed and started again it goes on where it was: what is scored lies in a folder
beside the CSV.  `random_best` is the best of the random schedules on the very text it is scored on, as the
paper takes it, which favours it.
"""

from collections.abc import Sequence

from absl import app

from sol_jax.command_line import define_flags, given, parse_flags
from sol_jax.errors import exits_on_user_error
from sol_jax.evaluation.options import EvaluateOptions
from sol_jax.evaluation.report import evaluate
from sol_jax.hosts import HostOptions, joined, together


@exits_on_user_error
def main(argv: Sequence[str]) -> None:
    del argv
    with joined(given(HostOptions)):
        evaluate(together(lambda: given(EvaluateOptions)))


if __name__ == "__main__":
    define_flags(EvaluateOptions())
    define_flags(HostOptions())
    app.run(main, flags_parser=parse_flags)
