"""What `experiments.studies.transfer` measured, paired by prompt: two policies, or a policy and a controller.

    python -m experiments.studies.paired --prompts runs/transfer-prompts.csv \\
        --baseline smollm2-135m/sol-j-fl --output experiments/results/transfer-paired.csv
    python -m experiments.studies.paired --prompts runs/transfer-prompts.csv \\
        --against fixed --output experiments/results/transfer-over-fixed.csv

Reads the CSV of single prompts that `transfer` leaves beside its output.  With `--baseline` a row is of
another policy, mode, controller, requested budget and measure: the mean less the baseline policy's at the
same mode, controller and budget.  With `--against` it is of a policy, mode, budget and measure: the mean less
that controller's at the same mode and budget.  Either has a 95 % interval bootstrapped over prompts.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.studies.transfer import MEASURES
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.statistics import document_bootstrap
from sol_jax.files import path_argument

Condition = tuple[str, ...]  # mode, controller and requested costs
Prompts = dict[str, Mapping[str, str]]  # index of a prompt -> its measures


def by_policy(rows: Sequence[Mapping[str, str]]) -> dict[str, dict[Condition, Prompts]]:
    """policy -> condition -> prompt -> its measures."""
    found: dict[str, dict[Condition, Prompts]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        asked = [row[name] for name in row if name.startswith("requested_")]
        found[row["policy"]][row["mode"], row["controller"], *asked][row["index"]] = row
    return found


def changes(ours: Prompts, theirs: Prompts) -> Iterator[dict[str, Any]]:
    """Per measure the mean of `ours` less `theirs` over the prompts that both have, with its interval."""
    common = sorted(ours.keys() & theirs.keys())
    for measure in MEASURES if common else ():
        difference_P = np.array([float(ours[p][measure]) - float(theirs[p][measure]) for p in common])
        difference_P = difference_P[np.isfinite(difference_P)]
        if len(difference_P):
            estimate = document_bootstrap(difference_P, np.arange(len(difference_P)))
            change = dict(zip(("change", "change_low", "change_high"), estimate, strict=True))
            yield {"measure": measure, "prompts": len(difference_P), **change}


def paired(rows: Sequence[Mapping[str, str]], baseline: str) -> list[dict[str, Any]]:
    """The rows with `--baseline`; `UserError` if the baseline is not among the policies."""
    policies = by_policy(rows)
    if baseline not in policies or len(policies) < 2:
        raise UserError(f"--baseline={baseline} must be one of at least two policies: {', '.join(policies)}")
    found = []
    for policy, conditions in policies.items():
        for condition, prompts in conditions.items():
            if policy == baseline or condition[0] == "plain":
                continue
            where = dict(zip(("mode", "controller"), condition, strict=False))
            about = {"policy": policy, "baseline": baseline, **where, "budget": "/".join(condition[2:])}
            found += [about | row for row in changes(prompts, policies[baseline].get(condition, {}))]
    return found


def against(rows: Sequence[Mapping[str, str]], controller: str) -> list[dict[str, Any]]:
    """The rows with `--against`; `UserError` if no policy was run beside that controller."""
    found = []
    for policy, conditions in by_policy(rows).items():
        for condition, prompts in conditions.items():
            mode, ours, *asked = condition
            if ours != "policy":
                continue
            about = {"policy": policy, "against": controller, "mode": mode, "budget": "/".join(asked)}
            theirs = conditions.get((mode, controller, *asked), {})
            found += [about | row for row in changes(prompts, theirs)]
    if not found:
        names = ", ".join(sorted({row["controller"] for row in rows}))
        raise UserError(
            f"--against={controller} was run at no mode and budget of a policy; there are {names}"
        )
    return found


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=path_argument, required=True, help="NAME-prompts.csv of transfer")
    other = parser.add_mutually_exclusive_group(required=True)
    other.add_argument("--baseline", help="the policy that the others are compared with")
    other.add_argument("--against", help="the controller that each policy is compared with, such as fixed")
    parser.add_argument("--output", type=path_argument, required=True, help="CSV to write")
    args = parser.parse_args(argv)
    try:
        rows = list(csv.DictReader(args.prompts.read_text().splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={args.prompts} cannot be read ({error})") from None
    if not rows or "index" not in rows[0]:
        raise UserError(f"--prompts={args.prompts} is not a NAME-prompts.csv of experiments.studies.transfer")
    found = paired(rows, args.baseline) if args.baseline is not None else against(rows, args.against)
    results.write(args.output, [results.texts(row) for row in found])


if __name__ == "__main__":
    main()
