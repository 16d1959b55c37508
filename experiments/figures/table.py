"""The results as a Markdown table: what each policy gains over another controller, budget by budget.

    python -m experiments.figures.table
    python -m experiments.figures.table --against entropy --model smollm2-135m

A line per run that has CSVs under `experiments/results`, seeds together.  A cell is the mean gain over seeds
in nats per token, the interval of `plots.points` (95 % over documents; of several seeds, from the lowest to
the highest end), the net keep rate, and the bytes that the policy's steps read and their operations, its own
network included, as shares of dense decoding.  The last column is the largest miss of a requested budget on
any axis by any seed, sweeps along one axis included.
"""

import argparse
import pathlib
from collections import defaultdict
from collections.abc import Sequence

from experiments import RESULTS
from experiments.figures import plots
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluation.scoring import POLICY
from sol_jax.files import path_argument


def largest_miss(rows: Sequence[plots.ResultRow]) -> tuple[float, str]:
    """How far a realised cost of the policy is from the requested one, at most, and on which axis."""
    names = [name.removeprefix("cost_") for name in rows[0].fields if name.startswith("cost_")]
    return max(
        (abs(cost - target), name)
        for row in rows
        if row.controller == POLICY
        for name, cost, target in zip(names, row.per_axis("cost"), row.per_axis("requested"), strict=True)
    )


def line(name: str, rows: Sequence[plots.ResultRow], against: str) -> str:
    """One run's line, of the seeds that were compared with that controller."""
    seeds = {row.seed for row in rows if row.controller == against}
    rows = [row for row in rows if row.seed in seeds]
    front = plots.front_rows(rows)
    gains = plots.points(front, against, "gain")
    work = [plots.points(front, POLICY, name) for name in ("bytes", "flops")]
    cells = [
        f"{gain.y:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] at {gain.x:.2f} ({read.y:.2f}, {flops.y:.2f})"
        for gain, read, flops in zip(gains, *work, strict=True)
    ]
    miss, axis = largest_miss(rows)
    return f"| `{name}` | {len(seeds)} | {' | '.join(cells)} | {miss:.3f} ({axis}) |"


def table(folder: pathlib.Path, model: str, against: str) -> str:
    """All runs' lines; `UserError` if no CSV has that controller."""
    by_run = defaultdict(list)
    # `task` is a column of experiments.tasks.downstream alone.
    rows = [row for row in plots.load(folder, f"{model}/*-s[0-9]") if "task" not in row.fields]
    for row in rows:
        if not row.held and not row.run.endswith("-random"):  # those are of less text
            by_run[row.run].append(row)
    lines = [
        line(name, rows, against)
        for name, rows in sorted(by_run.items())
        if any(row.controller == against for row in rows)
    ]
    if not lines:
        raise UserError(f"{folder / model} has no CSV with the controller {against!r}")
    columns = max(text.count(" at ") for text in lines)
    heads = [f"gain over {against} at net keep rate (bytes, FLOPs)", *[""] * (columns - 1)]
    return "\n".join(
        [f"| run | seeds | {' | '.join(heads)} | largest miss |", "|---" * (columns + 3) + "|", *lines]
    )


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=path_argument, default=RESULTS, help="folder of the CSVs")
    parser.add_argument("--model", default=plots.MODEL)
    parser.add_argument("--against", default="fixed", help="the other controller")
    args = parser.parse_args()
    print(table(args.results, args.model, args.against))


if __name__ == "__main__":
    main()
