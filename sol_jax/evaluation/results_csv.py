"""Rows of a comparison as CSV and as a table."""

import contextlib
import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sol_jax.errors import UserError
from sol_jax.evaluation.comparison import ComparisonRow, RandomScheduleRow
from sol_jax.files import is_remote, write_whole

# Rows that differ in one of these are not to be compared, so they never share a file.
IDENTITY = ("config", "text", "prefix", "protect", "restate", "one_budget", "stale_prefill")
CONTENT = ("weights", "tokenizer", "text_digest")  # likewise; files from before these columns do not say
LATER = {"restate": "False", "one_budget": ""}  # columns that older files lack, and what their rows are of
NOTES = {"random_best": "chosen on the text it is scored on, which favours it"}


def records(
    rows: Iterable[ComparisonRow | RandomScheduleRow], axis_names: Sequence[str], about: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Rows as CSV fields, with `about` (seed, commit, config ...) repeated on each."""
    flat = [_flat(dataclasses.asdict(row), axis_names) | texts(about) for row in rows]
    return [record | {"note": NOTES.get(record.get("controller", ""), "")} for record in flat]


def _flat(record: dict[str, Any], axis_names: Sequence[str]) -> dict[str, str]:
    """A column per axis for every field that has a value per axis."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, tuple):
            flat |= {f"{name}_{axis}": v for axis, v in zip(axis_names, value, strict=True)}
        else:
            flat[name] = value
    return texts(flat)


def texts(record: Mapping[str, Any]) -> dict[str, str]:
    """Values as they are written: numbers with seven digits."""
    return {
        name: f"{value:.7g}" if isinstance(value, float) else str(value) for name, value in record.items()
    }


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a CSV that `write` wrote; `UserError` if it is none."""
    try:
        text = path.read_bytes().decode("utf-8-sig")  # some programs put a mark before it
        reader = csv.DictReader(io.StringIO(text, newline=""))
        rows, names = list(reader), list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or "no CSV"
        raise UserError(f"{path} cannot be read ({why.lower()}); name a CSV of sol_jax.evaluate") from error
    if not rows or "nats" not in rows[0]:
        raise UserError(f"{path} is not a CSV of sol_jax.evaluate")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path} has two columns {twice[0]!r}; take one of them away")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():  # as DictReader has cells without a name, and missing ones
            raise UserError(f"{path}, line {number} has not as many cells as the head; mend or delete it")
    return rows


def write(path: pathlib.Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Writes a CSV, all or nothing; a field that only some rows have is empty in the others."""
    with _alone(path):
        _write(path, rows)


def _write(path: pathlib.Path, rows: Sequence[Mapping[str, str]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, restval="")
    writer.writeheader()
    writer.writerows(rows)
    try:
        write_whole(path, text.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}") from error


def check_same(path: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Raises `UserError` if `path` has rows that may not be compared with those of `about`."""
    if not path.exists():
        return
    ours = texts(about)
    for row in read(path):
        for name in (*IDENTITY, *CONTENT):
            theirs = row.get(name) or LATER.get(name)  # empty where rows were added to an older file
            own = ours.get(name) or LATER.get(name)
            if theirs != own and (theirs or name not in CONTENT):
                raise UserError(
                    f"{path} holds results of {name} {theirs!r}, and these are of {own!r}; "
                    "name another --output"
                )


def merge(path: pathlib.Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Adds rows to the CSV at `path`; one for the same controller and budget is replaced.

    So are those that stand beside another checkpoint at that budget, or are of more or less text: what the
    policy gains over them is not what it gains now.  Another program may do the same at the same time.

    Raises `UserError` if it has put rows there meanwhile that may not be compared with these.
    """

    def budget(row: Mapping[str, str]) -> tuple[str, ...]:
        names = sorted(name for name in row if name.startswith("requested_") or name in ("held", "along"))
        return tuple(row[name] for name in names)

    def key(row: Mapping[str, str]) -> tuple[str, ...]:
        return row.get("controller", ""), row.get("draw", ""), *budget(row)

    def subject(row: Mapping[str, str]) -> tuple[str, ...]:
        return row.get("updates") or "", row.get("blocks") or ""

    new, now = {key(row) for row in rows}, {budget(row): subject(row) for row in rows}
    with _alone(path):
        if rows and {*IDENTITY, *CONTENT} - LATER.keys() <= rows[0].keys():
            check_same(path, rows[0])
        old = read(path) if path.exists() else []
        kept = [
            row for row in old if key(row) not in new and now.get(budget(row), subject(row)) == subject(row)
        ]
        _write(path, [*kept, *rows])


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """Keeps other programs from a CSV, so that no rows are lost.

    What is locked is its folder, so that nothing is left there; systems without such locks, and object
    stores, go without.
    """
    if is_remote(path):
        yield
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            folder = os.open(path.parent, os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield


def table(rows: Sequence[ComparisonRow], axis_names: Sequence[str]) -> str:
    """The rows as text, one block per requested budget."""
    costs = "cost " + "/".join(axis_names)
    wide = max(22, len(costs), len(" / ".join(["0.000"] * len(axis_names))))
    shares = f"{'net':>6} {'bytes':>6} {'flops':>6}"
    head = f"{'controller':14} {costs:>{wide}} {shares} {'ppl':>9}   gain of the policy, nats/token"
    lines = [head, "-" * len(head)]
    for row in rows:
        if row.controller == "policy":
            held = f", {row.held} held dense" if row.held else ""
            lines.append("requested " + " / ".join(f"{c:.3f}" for c in row.requested) + held)
        cost = " / ".join(f"{c:.3f}" for c in row.cost)
        gain = f"{row.gain:+.4f} [{row.gain_low:+.4f}, {row.gain_high:+.4f}]"
        shown = "" if row.controller == "policy" else gain
        shares = f"{row.net:6.3f} {row.bytes:6.3f} {row.flops:6.3f}"
        lines.append(f"{row.controller:14} {cost:>{wide}} {shares} {row.perplexity:9.2f}   {shown}")
    return "\n".join(lines)
