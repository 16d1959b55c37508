"""Times of operations that are shorter than their dispatch, and what a compiled program launches.

JAX exposes no device events, so an operation is run in chains of N and of 2N calls, each on other buffers
(random, never zeros; together larger than the second-level cache where there is room), and its time is the
median slope.  What is compared takes turns in one process, in an order that rotates.
"""

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Instructions of a compiled program that run nothing on the device.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all")


class Chains(NamedTuple):
    """Ready to run, and blocking: chains of `calls` and of `2 * calls` calls."""

    short: Callable[[], Any]
    long: Callable[[], Any]
    calls: int
    launches: float | None  # of one call; None where the program is not XLA's


class DeviceRates(NamedTuple):
    """What the device reaches in this process: bytes per second (read and written) and FLOP per second."""

    copy: float
    matmul: float


def timed(function: Callable[..., Any], *args: Any, repeats: int) -> tuple[float, float, Any]:
    """Seconds of the first call (with compilation), of the best later one, and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    first = best = time.perf_counter() - start
    for _ in range(repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        best = min(best, time.perf_counter() - start)
    return first, best, result


def shown(row: dict[str, Any]) -> dict[str, Any]:
    print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    return row


def jax_chains(call: Callable[..., Any], inputs: Sequence[Any], buffers: Sequence[Any]) -> Chains:
    """Chains of `call(input, buffer)`, one call per input; buffers take turns.  Half as many are the short.

    Inputs must differ, or equal calls become one.
    """
    return compile_chains(call, inputs, buffers)(inputs, buffers)


def compile_chains(
    call: Callable[..., Any], inputs: Sequence[Any], buffers: Sequence[Any]
) -> Callable[[Sequence[Any], Sequence[Any]], Chains]:
    """The same for any inputs and buffers of these shapes: from them to the chains."""
    lengths = sorted({max(1, len(inputs) // 2), len(inputs)})  # of one input: the one chain, for its answer

    def compiled(length: int) -> Any:
        @jax.jit
        def run(inputs: Sequence[Any], buffers: Sequence[Any]) -> list[Any]:
            outputs = []
            for i in range(length):
                out = call(inputs[i], buffers[i % len(buffers)])
                # In turn, as in a model: a layer needs what the one before it gave.
                out, inputs = lax.optimization_barrier((out, inputs))
                outputs.append(out)
            return outputs

        return run.lower(inputs, buffers).compile()

    short, *longer = map(compiled, lengths)
    long = longer[0] if longer else short
    launches = count_launches(short.as_text()) / lengths[0]

    def bind(inputs: Sequence[Any], buffers: Sequence[Any]) -> Chains:
        return Chains(
            lambda: jax.block_until_ready(short(inputs, buffers)),
            lambda: jax.block_until_ready(long(inputs, buffers)),
            lengths[0],
            launches,
        )

    return bind


def measure(chains: Mapping[str, Chains], rounds: int) -> dict[str, float]:
    """Seconds per call of each; NaN where the slope is lost in the noise."""
    names = list(chains)
    slopes: dict[str, list[float]] = {name: [] for name in names}
    for name in names:  # warm
        chains[name].short(), chains[name].long()
    for i in range(rounds):
        turn = i % len(names)
        for name in (*names[turn:], *names[:turn]):
            pair = chains[name].short, chains[name].long
            first, second = (_seconds(run) for run in (pair if i % 2 else pair[::-1]))
            short, long = (first, second) if i % 2 else (second, first)
            slopes[name].append((long - short) / chains[name].calls)
    medians = {name: statistics.median(values) for name, values in slopes.items()}
    return {name: value if value > 0 else math.nan for name, value in medians.items()}


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_rates(smoke: bool, rounds: int) -> DeviceRates:
    """A copy of large arrays (each read and written once), and a large bfloat16 product."""
    numbers, size = (1 << 16, 128) if smoke else (1 << 28, 8192)

    def normals(shape: tuple[int, ...], count: int) -> list[jax.Array]:
        draw = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))
        return [draw(key) for key in jax.random.split(jax.random.key(0), count)]

    halves = [jnp.bfloat16(1 + i / 8) for i in range(8)]
    copy = jax_chains(lambda scale, x: x * scale, halves, normals((numbers,), 2))
    matmul = jax_chains(lambda a, b: a @ b, normals((size, size), 8), normals((size, size), 2))
    seconds = measure({"copy": copy, "matmul": matmul}, rounds)
    return DeviceRates(4 * numbers / seconds["copy"], 2 * size**3 / seconds["matmul"])


def count_launches(hlo: str) -> float:
    """Kernels and library calls that a compiled program starts, the bodies of its loops as often as they run.

    Loops whose length is not known when compiling count once.
    """
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in hlo.splitlines():
        if line.endswith("{") and " -> " in line and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            lines = bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif " = " in line:
            lines.append(line.split(" = ", 1)[1])
    return _launches(entry, bodies)


def _launches(computation: str, bodies: Mapping[str, list[str]]) -> float:
    total = 0.0
    for line in bodies[computation]:
        found = re.search(r"(?:^| )([a-z][\w\-]*)\(", line)
        opcode = found[1] if found else "parameter"
        if opcode in ("while", "call", "conditional"):
            called = re.findall(r"(?:body|to_apply|(?:true|false)_computation)=%?([\w.\-]+)", line)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                called += [name.strip().lstrip("%") for name in group.split(",")]
            trips = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
            total += (int(trips[1]) if trips else 1) * max(_launches(name, bodies) for name in called)
        elif opcode not in FREE and not opcode.endswith("-done"):
            total += 1
    return total


def walls(runs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Median seconds of each, in turns; for what takes so long that its dispatch does not count."""
    names = list(runs)
    taken: dict[Any, list[float]] = {name: [] for name in names}
    for name in names:  # warm
        jax.block_until_ready(runs[name]())
    for i in range(rounds):
        turn = i % len(names)
        for name in (*names[turn:], *names[:turn]):
            start = time.perf_counter()
            jax.block_until_ready(runs[name]())
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}
