"""Records of single items of a downstream task, as lines of JSON, by which a killed sweep goes on."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sol_jax import hosts
from sol_jax.errors import UserError
from sol_jax.files import parse_json


class ItemRecord(NamedTuple):
    """One item under one controller.  Costs are of all its choices together."""

    item: str
    right: bool
    right_norm: bool | None  # by log-likelihood per character; None where that is not defined
    logp: tuple[float, ...]  # of every choice, in nats; none for a free answer
    tokens: int  # of the right choice, or of the free answer
    answer: int  # which choice is right
    cost: tuple[float, ...]  # per axis, summed over the controllable steps
    steps: int  # of them
    work: tuple[float, float]  # bytes read and operations after the prefill
    dense_work: tuple[float, float]  # what they would have been densely
    text: str = ""  # of a free answer


def read(path: pathlib.Path) -> list[ItemRecord]:
    """The whole lines of a file; none if it is not there."""
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # not what a killed process began to write
        return [_of_fields(parse_json(line)) for line in lines]
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged; delete it, and its items are run again") from None


def read_for_all(path: pathlib.Path) -> list[ItemRecord]:
    """`read`, in all processes of a run; the first reads, and tells the others."""
    found = hosts.together(lambda: read(path) if hosts.first() else [])
    return [_of_fields(fields) for fields in hosts.tell([record._asdict() for record in found])]


def _of_fields(fields: Mapping[str, Any]) -> ItemRecord:
    return ItemRecord(**{name: _tuple(value) for name, value in fields.items()})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def append_records(path: pathlib.Path, records: Sequence[ItemRecord]) -> None:
    """Appends records."""
    append_lines(path, [json.dumps(record._asdict(), ensure_ascii=False) for record in records])


def append_lines(path: pathlib.Path, lines: Sequence[str]) -> None:
    """Appends lines; what a killed process began to write is cut off first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.is_file() else b""
        with open(path, "r+b" if whole else "wb") as file:
            file.seek(whole.rfind(b"\n") + 1)
            file.truncate()
            file.write("".join(line + "\n" for line in lines).encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}") from error


def mean_cost(records: Sequence[ItemRecord]) -> np.ndarray:
    """Realised budget per axis; of no controllable step, that of dense ones."""
    steps = sum(record.steps for record in records)
    total_X = np.sum([record.cost for record in records], 0)
    return total_X / steps if steps else np.ones(len(total_X))


def shares(records: Sequence[ItemRecord]) -> Mapping[str, float]:
    """Bytes and operations as shares of the dense ones."""
    spent, dense = (np.sum([getattr(r, name) for r in records], 0) for name in ("work", "dense_work"))
    return dict(zip(("bytes", "flops"), (spent / dense).tolist(), strict=True))
