"""Compiles kernels and programs for TPUs that are not here, with bounds on memory; `make tpu-check`.

    python -m experiments.benchmarks.tpu_check             # everything, for every chip
    python -m experiments.benchmarks.tpu_check --quick     # what CI compiles, in minutes
    python -m experiments.benchmarks.tpu_check --only decode_step --chips v5e,v4
    python -m experiments.benchmarks.tpu_check --resume    # goes on where one before was stopped

It needs libtpu and no TPU.  What does not compile fails, and what holds a second copy: of weights or caches,
or, a kernel, of half of its largest operand.  Whole programs have tighter bounds on temporaries besides, if
experiments/results/tpu_check.csv has any; `--write` makes them of what it measures: see `bound_of`.
"""

import argparse
import csv
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax

from experiments import RESULTS
from experiments.benchmarks.tpu_programs import Check, checks, size_of
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
TABLE = RESULTS / "tpu_check.csv"
DONE = pathlib.Path("build/tpu_check_done.csv")  # a row for each program of this check that was right
COLUMNS = ("check", "chip", "arguments_mib", "temporaries_mib", "bound_mib")
MIB = 2**20
# Temporaries of a kernel that is given little: rounding up, masks, what is known by page.
LITTLE = 8 * MIB

Rows = dict[tuple[str, str], dict[str, str]]


def read_table(path: pathlib.Path = TABLE) -> Rows:
    """The committed rows, by check and chip."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(row["check"], row["chip"]): row for row in csv.DictReader(file)}


def write_table(rows: Rows, path: pathlib.Path = TABLE) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


class Done:
    """The programs that were right so far, in a file, so that a check that was stopped goes on."""

    def __init__(self, path: pathlib.Path, resume: bool):
        self._path = path
        self._rows: set[tuple[str, ...]] = set()
        path.parent.mkdir(exist_ok=True)
        if resume and path.exists():
            with path.open(newline="") as file:
                self._rows = {tuple(row) for row in csv.reader(file)}
        else:
            path.write_text("")

    def __contains__(self, name_and_chip: tuple[str, str]) -> bool:
        return name_and_chip in self._rows

    def add(self, name: str, chip: str) -> None:
        with self._path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow((name, chip))


def second_copy(check: Check, largest: int) -> float:
    """Bytes of temporaries at which something is there twice: half of what must not be.

    `largest` is a kernel's largest operand.
    """
    return max(largest / 2, LITTLE) if check.never is None else check.once + check.never / 2


def bound_of(check: Check, temporaries: float) -> int:
    """MiB that a program's temporaries may have, once they were measured: a tenth more.

    The compiler does not come to the same each time: what it may hold once it now copies, and now does not.
    """
    return math.ceil((max(1.1 * temporaries, check.once) + LITTLE) / MIB)


class TooLargeError(Exception):
    """The arguments of a program, and what it holds by its nature, do not fit."""


def compile_check(check: Check, chip: str) -> tuple[dict[str, str], str]:
    """The row of a program on a chip, and what is wrong with it."""
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
    found = tpu.compile_for_tpu(fn, *args, donate=donated)
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(args))
    row: dict[str, Any] = {"check": check.name, "chip": chip}
    row["bound_mib"] = bound_of(check, found.temporaries)
    row["arguments_mib"] = f"{found.arguments / MIB:.1f}"
    row["temporaries_mib"] = f"{found.temporaries / MIB:.1f}"
    limit = second_copy(check, largest)
    wrong = f"a second copy: {row['temporaries_mib']} of {limit / MIB:.1f} MiB" * (found.temporaries > limit)
    return {name: str(value) for name, value in row.items()}, wrong


def _beyond(temporaries: str, bound: str | None) -> str:
    """What is wrong with temporaries, beside their bound in the table; nothing if it has none."""
    if bound is None or float(temporaries) <= float(bound):
        return ""
    return f"{temporaries} MiB of temporaries, {bound} allowed"


def quick_chips(check: Check) -> tuple[str, ...]:
    """What CI compiles for: kernels where they have the least memory, programs for a common chip."""
    return ("v4",) if check.never is None else ("v5e",)


def run(
    chosen: Iterable[Check],
    chips_of: Callable[[Check], Iterable[str]],
    table: Rows,
    keep: Callable[[Rows], None] = lambda measured: None,
    done: Done | None = None,
) -> tuple[Rows, list[str], int]:
    """The rows of whole programs, a line for each failure, and how many programs compiled.

    Rows so far are given to `keep` after each, since the whole takes long; what is in `done` is left out.
    """
    measured: Rows = {}
    failed, compiled = [], 0
    for check in chosen:
        for chip in chips_of(check):
            if done is not None and (check.name, chip) in done:
                continue
            start = time.perf_counter()
            try:
                row, wrong = compile_check(check, chip)
            except TooLargeError as error:
                print(f"{check.name} on {chip}: left out, {error} are too much for it", flush=True)
                continue
            except Exception as error:  # say so, and go on with the next
                row, wrong = {}, f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
            else:
                compiled += 1
                if check.never is not None:
                    bound = table.get((check.name, chip), {}).get("bound_mib")
                    if not wrong:  # what is there twice gets no bound
                        measured[check.name, chip] = row
                        keep(measured)
                    wrong = wrong or _beyond(row["temporaries_mib"], bound)
            if wrong:
                failed.append(f"{check.name} on {chip}: {wrong}")
            elif done is not None:
                done.add(check.name, chip)
            took = time.perf_counter() - start
            said = f"FAILED: {wrong}" if wrong else f"{row['temporaries_mib']} MiB of temporaries"
            print(f"{check.name} on {chip}: {said} ({took:.1f} s)", flush=True)
    return measured, failed, compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a selection, on one chip each")
    parser.add_argument("--chips", default="", help=f"of {', '.join(TOPOLOGIES)}, with commas between")
    parser.add_argument("--only", default="", help="what has this in its name")
    parser.add_argument("--write", action="store_true", help="make bounds of what is measured")
    parser.add_argument("--resume", action="store_true", help="leave out what the check before found right")
    args = parser.parse_args()
    if (problem := tpu.problem()) is not None:
        sys.exit(f"tpu-check: {problem}")
    chips = args.chips.split(",") if args.chips else list(TOPOLOGIES)
    if unknown := [chip for chip in chips if chip not in TOPOLOGIES]:
        sys.exit(f"--chips: {unknown[0]!r} is none of {', '.join(TOPOLOGIES)}")
    chosen = [check for check in checks() if args.only in check.name and (check.quick or not args.quick)]
    start, table = time.monotonic(), read_table()
    chips_of = quick_chips if args.quick and not args.chips else lambda check: chips

    def keep(measured: Rows) -> None:
        if args.write:
            write_table(table | measured)

    done = None if args.quick else Done(DONE, args.resume)
    _, failed, compiled = run(chosen, chips_of, table, keep, done)
    print(f"{compiled} programs compiled in {time.monotonic() - start:.0f} s, {len(failed)} failures")
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
