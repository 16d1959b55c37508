"""What checks of compiled programs share: their programs, the committed table, and going on after a stop.

`tpu_check` and `gpu_compile_check` compile for chips that are not here; each says what it measures of a
program, and what is wrong with that.
"""

import argparse
import csv
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from sol_jax.planning.topology import Topology

MIB = 2**20
# Temporaries of a kernel that is given little: rounding up, masks, what is known by page.
LITTLE = 8 * MIB

Program = tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]  # function, abstract arguments, donated
Row = dict[str, str]
Rows = dict[tuple[str, ...], Row]


@dataclasses.dataclass(frozen=True)
class Check:
    """One program; `make` is called where ops are traced for the chip.

    `on` is of programs on a mesh: their arguments say where on a topology they lie.  `once` are the bytes
    that a program makes and holds by its nature, `never` those that must not be there twice: the smaller of
    weights and caches.
    """

    name: str
    make: Callable[[], Program] | None = None
    on: Callable[[Topology], Program] | None = None
    once: int = 0
    never: int | None = None  # None: of a kernel, whose operands are measured
    quick: bool = False  # among those that CI compiles


@dataclasses.dataclass(frozen=True)
class Table:
    """A committed CSV, its rows by the columns of `key`."""

    path: pathlib.Path
    columns: tuple[str, ...]
    key: tuple[str, ...] = ("check", "chip")

    def read(self) -> Rows:
        if not self.path.exists():
            return {}
        with self.path.open(newline="") as file:
            return {tuple(row[name] for name in self.key): row for row in csv.DictReader(file)}

    def write(self, rows: Mapping[tuple[str, ...], Row]) -> None:
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
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
    return check.once + (max(largest / 2, LITTLE) if check.never is None else check.never / 2)


def bound_of(check: Check, temporaries: float) -> int:
    """MiB that a program's temporaries may have, once they were measured: a tenth more.

    The compiler does not come to the same each time: what it may hold once it now copies, and now does not.
    """
    return math.ceil((max(1.1 * temporaries, check.once) + LITTLE) / MIB)


class TooLargeError(Exception):
    """The arguments of a program, and what it holds by its nature, do not fit."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A program that compiled: its rows of the table, what is wrong with it (or ""), and what to say."""

    rows: Rows
    wrong: str
    said: str


def run(
    chosen: Iterable[Check],
    chips_of: Callable[[Check], Iterable[str]],
    compiled_on: Callable[[Check, str], Found],
    keep: Callable[[Rows], None] = lambda measured: None,
    done: Done | None = None,
) -> tuple[Rows, list[str], int]:
    """The rows of all programs, a line for each failure, and how many programs compiled.

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
                found = compiled_on(check, chip)
            except TooLargeError as error:
                print(f"{check.name} on {chip}: left out, {error} are too much for it", flush=True)
                continue
            except Exception as error:  # say so, and go on with the next
                found = Found({}, f"{type(error).__name__}: {str(error).splitlines()[0][:300]}", "")
            else:
                compiled += 1
                if found.rows:
                    measured |= found.rows
                    keep(measured)
            if found.wrong:
                failed.append(f"{check.name} on {chip}: {found.wrong}")
            elif done is not None:
                done.add(check.name, chip)
            took = time.perf_counter() - start
            said = f"FAILED: {found.wrong}" if found.wrong else found.said
            print(f"{check.name} on {chip}: {said} ({took:.1f} s)", flush=True)
    return measured, failed, compiled


def main(
    name: str,
    about: str,
    checks: Callable[[], list[Check]],
    chips: Collection[str],
    quick_chips: Callable[[Check], Iterable[str]],
    table: Table,
    compiled_on: Callable[[Check, str, Rows], Found],
    done_path: pathlib.Path,
    problem: str | None,
) -> None:
    """The program `name`: flags in, the check, and exit code 1 if anything failed.

    `compiled_on` is given the committed rows, whose bounds it holds programs to.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="a selection, on one chip each")
    parser.add_argument("--chips", default="", help=f"of {', '.join(chips)}, with commas between")
    parser.add_argument("--only", default="", help="what has this in its name")
    parser.add_argument("--write", action="store_true", help="make bounds of what is measured")
    parser.add_argument("--resume", action="store_true", help="leave out what the check before found right")
    args = parser.parse_args()
    if problem is not None:
        sys.exit(f"{name}: {problem}")
    asked = args.chips.split(",") if args.chips else list(chips)
    if unknown := [chip for chip in asked if chip not in chips]:
        sys.exit(f"--chips: {unknown[0]!r} is none of {', '.join(chips)}")
    chosen = [check for check in checks() if args.only in check.name and (check.quick or not args.quick)]
    start, committed = time.monotonic(), table.read()
    chips_of = quick_chips if args.quick and not args.chips else lambda check: asked

    def keep(measured: Rows) -> None:
        if args.write:
            compiled = {key[:2] for key in measured}  # a program's rows are replaced together
            others = {key: row for key, row in committed.items() if key[:2] not in compiled}
            table.write(others | measured)

    def one(check: Check, chip: str) -> Found:
        return compiled_on(check, chip, committed)

    done = None if args.quick else Done(done_path, args.resume)
    _, failed, compiled = run(chosen, chips_of, one, keep, done)
    print(f"{compiled} programs compiled in {time.monotonic() - start:.0f} s, {len(failed)} failures")
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    sys.exit(bool(failed))
