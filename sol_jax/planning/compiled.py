"""What a compiled program takes: memory per device, and the collectives between devices.

The collectives are read from the compiled text, those of a loop as often as it turns.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "token": 0}  # others say theirs: f32, s8, u16
_CALLS = re.compile(r"(body|calls|to_apply|branch_computations)=(\{.*?\}|[^,]+)")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program on one device; sizes in bytes.  `aliased` is output that overwrites donated arguments."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    seconds: float  # of compiling
    collectives: dict[str, tuple[int, float]]  # by kind: how many run, and the bytes of their results

    @property
    def total(self) -> int:
        """All that is held at once while it runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


def of_executable(executable: Any, seconds: float) -> Compiled:
    """What a `jax.stages.Compiled` takes."""
    sizes = executable.memory_analysis()
    return Compiled(
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes,
        sizes.temp_size_in_bytes,
        sizes.alias_size_in_bytes,
        seconds,
        count_collectives(executable.as_text()),
    )


def count_collectives(text: str) -> dict[str, tuple[int, float]]:
    """How many collectives of each kind a program runs, and the bytes of their results.

    A loop whose number of turns the compiler does not know counts once.
    """
    bodies = dict(_computations(text))
    turns = _turns(bodies)
    found: dict[str, tuple[int, float]] = {}
    for name, lines in bodies.items():
        for line in lines:
            kind = re.search(rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
            if kind and turns.get(name, 0):
                count, size = found.get(kind[2], (0, 0.0))
                found[kind[2]] = count + turns[name], size + turns[name] * _bytes(kind[1], bool(kind[3]))
    return found


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Names and lines; the one that a program starts with is called ''."""
    name: str | None = None
    lines: list[str] = []
    for line in text.splitlines():
        opened = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if opened and not line.startswith(" "):
            name, lines = "" if opened[1] else opened[2], []
        elif line.startswith("}") and name is not None:
            yield name, lines
            name = None
        elif name is not None:
            lines.append(line)


def _turns(bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs."""
    turns: dict[str, int] = {}

    def run(name: str, times: int) -> None:
        turns[name] = turns.get(name, 0) + times
        for line in bodies.get(name, ()):
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for role, called in re.findall(
                r"(body|condition|calls|to_apply|branch_computations)=([^,]+|\{.*?\})", line
            ):
                for each in re.findall(r"%?([\w.-]+)", called):
                    if each in bodies and role != "condition":
                        run(each, times * (int(known[1]) if known and role == "body" else 1))

    run("", 1)
    return turns


def _bytes(shapes: str, started: bool) -> float:
    """Of the shapes of a result; one that is started has its operands in front of its results."""
    sizes = []
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        bits = _BITS.get(kind) or int("".join(re.findall(r"\d+", kind)[:1]) or 0)
        sizes.append(bits / 8 * math.prod(int(size) for size in dims.split(",") if size))
    return sum(sizes[len(sizes) // 2 :]) if started and len(sizes) > 1 else sum(sizes)
