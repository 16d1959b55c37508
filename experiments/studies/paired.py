"""Two policies, or modes of one, on the same prompts: what `experiments.studies.transfer` measured, paired.

    python -m experiments.studies.paired --prompts experiments/results/transfer-prompts.csv \\
        --baseline smollm2-135m/sol-j-fl --output experiments/results/transfer-paired.csv

Reads the CSV of single prompts that `transfer` leaves beside its output.  The CSV it writes has one row per
other policy, mode, controller, requested budget and measure: the mean less the baseline policy's at the same
mode, controller and budget, with a 95 % interval bootstrapped over prompts.
"""

import argparse
import csv
import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.studies.transfer import MEASURES
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.statistics import document_bootstrap

Condition = tuple[str, ...]  # mode, controller and requested costs


def by_policy(rows: Sequence[Mapping[str, str]]) -> dict[str, dict[Condition, dict[str, Mapping[str, str]]]]:
    """policy -> condition -> prompt -> its measures."""
    found: dict[str, dict[Condition, dict[str, Mapping[str, str]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        asked = [row[name] for name in row if name.startswith("requested_")]
        found[row["policy"]][row["mode"], row["controller"], *asked][row["index"]] = row
    return found


def paired(rows: Sequence[Mapping[str, str]], baseline: str) -> list[dict[str, Any]]:
    """The rows of the CSV; `UserError` if the baseline is not among the policies."""
    policies = by_policy(rows)
    if baseline not in policies or len(policies) < 2:
        raise UserError(f"--baseline={baseline} must be one of at least two policies: {', '.join(policies)}")
    found = []
    for policy, conditions in policies.items():
        for condition, prompts in conditions.items():
            theirs = policies[baseline].get(condition, {})
            common = sorted(prompts.keys() & theirs.keys())
            if policy == baseline or condition[0] == "plain" or not common:
                continue
            for measure in MEASURES:
                difference_P = np.array(
                    [float(prompts[p][measure]) - float(theirs[p][measure]) for p in common]
                )
                difference_P = difference_P[np.isfinite(difference_P)]
                if len(difference_P):
                    estimate = document_bootstrap(difference_P, np.arange(len(difference_P)))
                    where = dict(zip(("mode", "controller"), condition, strict=False))
                    budget = {
                        "budget": "/".join(condition[2:]),
                        "measure": measure,
                        "prompts": len(difference_P),
                    }
                    change = dict(zip(("change", "change_low", "change_high"), estimate, strict=True))
                    found.append({"policy": policy, "baseline": baseline, **where, **budget, **change})
    return found


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=pathlib.Path, required=True, help="NAME-prompts.csv of transfer")
    parser.add_argument("--baseline", required=True, help="the policy that the others are compared with")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="CSV to write")
    args = parser.parse_args(argv)
    try:
        rows = list(csv.DictReader(args.prompts.read_text().splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={args.prompts} cannot be read ({error})") from None
    if not rows or "index" not in rows[0]:
        raise UserError(f"--prompts={args.prompts} is not a NAME-prompts.csv of experiments.studies.transfer")
    results.write(args.output, [results.texts(row) for row in paired(rows, args.baseline)])


if __name__ == "__main__":
    main()
