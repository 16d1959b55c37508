"""Compiles kernels and programs for TPUs that are not here, with bounds on memory; `make tpu-check`.

    python -m experiments.benchmarks.tpu_check             # everything, for every chip
    python -m experiments.benchmarks.tpu_check --quick     # what CI compiles, in minutes
    python -m experiments.benchmarks.tpu_check --only decode_step --chips v5e,v4
    python -m experiments.benchmarks.tpu_check --resume    # goes on where one before was stopped

It needs libtpu and no TPU.  What does not compile fails, and what holds a second copy: of weights or caches,
or, a kernel, of half of its largest operand.  Whole programs have tighter bounds on temporaries besides, if
experiments/results/tpu_check.csv has any; `--write` makes them of what it measures: see `bound_of`.
"""

import dataclasses
import pathlib
from typing import Any

import jax

from experiments import RESULTS
from experiments.benchmarks import compile_check
from experiments.benchmarks.compile_check import (
    MIB,
    Check,
    Found,
    Row,
    Rows,
    Table,
    TooLargeError,
    bound_of,
    second_copy,
)
from experiments.benchmarks.program_cases import size_of
from experiments.benchmarks.tpu_programs import checks, turned_operands
from pallas_kernels.dispatch import tracing_for
from sol_jax.planning import tpu
from sol_jax.planning.topology import parse_topology

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
TABLE = Table(RESULTS / "tpu_check.csv", ("check", "chip", "arguments_mib", "temporaries_mib", "bound_mib"))
DONE = pathlib.Path("build/tpu_check_done.csv")  # a row for each program of this check that was right


def measure(check: Check, chip: str) -> tuple[Row, str]:
    """The row of a program on a chip, and what is wrong with it whatever the table says."""
    topology = parse_topology(TOPOLOGIES[chip])
    with tracing_for("tpu"):
        if check.on:
            fn, args, donated = check.on(topology)
        else:
            assert check.make
            fn, args, donated = check.make()
            if (size := size_of(args) + check.once) > 0.95 * topology.chip.memory:
                raise TooLargeError(f"{size / 2**30:.1f} GiB of arguments and what is made of them")
            args = tpu.on_one(topology, args)
    if check.never is None:
        check = dataclasses.replace(check, once=turned_operands(args))
    found = tpu.compile_for_tpu(fn, *args, donate=donated)
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(args))
    row: dict[str, Any] = {"check": check.name, "chip": chip}
    row["bound_mib"] = bound_of(check, found.temporaries)
    row["arguments_mib"] = f"{found.arguments / MIB:.1f}"
    row["temporaries_mib"] = f"{found.temporaries / MIB:.1f}"
    limit = second_copy(check, largest)
    wrong = f"a second copy: {row['temporaries_mib']} of {limit / MIB:.1f} MiB" * (found.temporaries > limit)
    return {name: str(value) for name, value in row.items()}, wrong


def held_to(check: Check, chip: str, committed: Rows) -> Found:
    """A program beside its bound in the table; of kernels, and of what is there twice, no row is kept."""
    row, wrong = measure(check, chip)
    said = f"{row['temporaries_mib']} MiB of temporaries"
    if check.never is None or wrong:
        return Found({}, wrong, said)
    bound = committed.get((check.name, chip), {}).get("bound_mib")
    return Found({(check.name, chip): row}, _beyond(row["temporaries_mib"], bound), said)


def _beyond(temporaries: str, bound: str | None) -> str:
    """What is wrong with temporaries, beside their bound in the table; nothing if it has none."""
    if bound is None or float(temporaries) <= float(bound):
        return ""
    return f"{temporaries} MiB of temporaries, {bound} allowed"


def quick_chips(check: Check) -> tuple[str, ...]:
    """What CI compiles for: kernels where they have the least memory, programs for a common chip."""
    return ("v4",) if check.never is None else ("v5e",)


def main() -> None:
    about = str(__doc__).splitlines()[0]
    compile_check.main(
        "tpu-check", about, checks, TOPOLOGIES, quick_chips, TABLE, held_to, DONE, tpu.problem()
    )


if __name__ == "__main__":
    main()
