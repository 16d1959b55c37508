"""Measures every kernel beside its peers, and decode steps, generation and updates with and without them.

    python -m experiments.benchmarks.kernels            # on a GPU; `make gpu-check` tests the kernels first
    python -m experiments.benchmarks.kernels --smoke    # anywhere: tiny shapes, kernels interpreted on a CPU
    python -m experiments.benchmarks.kernels --verify   # no times: every operation against float64

Needs jax, flax, optax and numpy; torch is a peer if it is there.  Times are medians of slopes (see `timing`),
of `--rounds` rounds in which what is compared takes turns; the copy and matmul rates are measured in the same
process.  What `--minutes` has no room for is named and left out.  Timed or not, a kernel whose answer is
further from float64 than it may be fails the run.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from experiments import RESULTS
from experiments.benchmarks import kernel_steps, timing
from experiments.benchmarks.attention_cases import attention, bounds, choice, shared_prefix
from experiments.benchmarks.gpu_check import INCOMPLETE
from experiments.benchmarks.kernel_cases import KernelCase
from experiments.benchmarks.kernel_table import device_name, finish_steps, is_wrong, run_case, show, write
from experiments.benchmarks.mlp_cases import pruned_mlp, rounding
from pallas_kernels.dispatch import current_platform
from pallas_kernels.shapes import Shape, distinct, named
from sol_jax.files import path_argument

KEEPS = (0.1, 0.3, 0.6, 1.0)
TINY = Shape("tiny", 64, 128, 4, 2, 16, 2, 64, 8)
# Seconds that an operation may take the first time (programs to compile, a peer's libraries to load); from
# then on its own longest tells.
FIRST = {"decode_step": 60.0, "update": 90.0, "generation": 90.0}
OTHERS_FIRST = 25.0


def cases(smoke: bool) -> list[tuple[str, Callable[[], KernelCase]]]:
    """What is measured, the most important first; nothing is allocated before its turn."""
    if smoke:
        return [
            ("attend tiny", lambda: attention(TINY, (0.3, 1.0), smoke=True)),
            ("gated_hidden tiny", lambda: pruned_mlp(TINY, 1, (0.4,), smoke=True)),
            ("shared_prefix tiny", lambda: shared_prefix(TINY, 3, (0.5,), smoke=True)),
            ("quantize_residual tiny", lambda: rounding(TINY, 2, (5, 16), smoke=True)),
            ("page_bounds tiny", lambda: bounds(TINY, smoke=True)),
            ("select_pages tiny", lambda: choice(TINY, (0.3,), smoke=True)),
        ]
    small, one, three, eight = (shape.name for shape in distinct("name"))

    def attend(name: str) -> tuple[str, Callable[[], KernelCase]]:
        return f"attend {name}", lambda: attention(named(name), KEEPS)

    def gated(model: str, rows: int) -> tuple[str, Callable[[], KernelCase]]:
        sizes = next(shape for shape in distinct("name") if shape.name == model)
        return f"gated_hidden {model} {rows} rows", lambda: pruned_mlp(sizes, rows, (0.2, 0.4, 0.7))

    def shared(name: str) -> tuple[str, Callable[[], KernelCase]]:
        return f"shared_prefix {name}", lambda: shared_prefix(named(name), 16, (0.3, 1.0))

    def quantize(rows: int) -> tuple[str, Callable[[], KernelCase]]:
        sizes = named(f"{eight}-1x1024-p16")
        return f"quantize_residual {rows} rows", lambda: rounding(sizes, rows, (5, 16))

    long = f"{eight}-8x32768-p16"
    return [
        attend(long),
        gated(eight, 1),
        shared(f"{eight}-8x1024-p8"),
        attend(f"{eight}-1x32768-p16"),
        quantize(128),
        (f"select_pages {long}", lambda: choice(named(long), (0.1, 1.0))),
        attend(f"{one}-8x131072-p16"),
        gated(eight, 2),
        gated(one, 1),
        attend(f"{one}-8x1024-p16"),
        attend(f"{one}-128x8192-p16"),
        shared(f"{one}-8x1024-p8"),
        quantize(1),
        attend(f"{three}-8x32768-p16"),
        attend(f"{small}-8x32768-p8"),
        attend(f"{one}-1x131072-p16"),
        (f"page_bounds {long}", lambda: bounds(named(long))),
        gated(eight, 8),
        gated(three, 1),
        gated(small, 1),
        shared(f"{small}-8x1024-p8"),
    ]


def verified(smoke: bool) -> list[tuple[str, Callable[[], KernelCase]]]:
    """Every operation at shapes of every model, in both dtypes, small enough for a host's float64.

    All in bfloat16 first, what models run in: what there is no time for is in float32.
    """
    shapes = (TINY,) if smoke else tuple(named(f"{s.name}-8x1024-p8") for s in distinct("name"))

    def of(s: Shape, dtype: str) -> list[tuple[str, Callable[[], KernelCase]]]:
        label = f"{s} {dtype}"
        return [
            (f"attend {label}", lambda: attention(s, (0.1, 1.0), dtype, smoke=True)),
            *(
                (f"gated_hidden {label} {n} rows", lambda n=n: pruned_mlp(s, n, (0.4,), dtype, smoke=True))
                for n in (1, 3)
            ),
            (f"shared_prefix {label}", lambda: shared_prefix(s, 4, (0.5,), dtype, smoke=True)),
            (f"page_bounds {label}", lambda: bounds(s, dtype, smoke=True)),
            (f"select_pages {label}", lambda: choice(s, (0.1,), dtype, smoke=True)),
        ]

    rows = [(f"quantize_residual {s}", lambda s=s: rounding(s, 8, (2, 8, 16), smoke=True)) for s in shapes]
    bfloat16, float32 = ([case for s in shapes for case in of(s, name)] for name in ("bfloat16", "float32"))
    return [*bfloat16, *rows, *float32]


def verify(smoke: bool, deadline: float) -> int:
    """Runs `verified`; 1 if an implementation is wrong or fails, INCOMPLETE if time ran out, otherwise 0."""
    failed = left_out = 0
    with jax.default_matmul_precision("highest"):  # a GPU would round float32 operands to tensor floats
        for label, make in verified(smoke):
            if time.monotonic() > deadline:
                left_out += 1
                print(f"left out, no time: {label}", flush=True)
                continue
            for row in run_case(make(), 0, None):
                if not row["peer"]:
                    failed += is_wrong(row) or "error" not in row
                    show(row)
    print(f"compared with float64: {failed} wrong, {left_out} operations left out", flush=True)
    return 1 if failed else INCOMPLETE if left_out else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="what there is no time for is left out")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds of each operation")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, few rounds; runs on a CPU")
    parser.add_argument("--verify", action="store_true", help="compare with float64 and measure nothing")
    parser.add_argument(
        "--csv", type=path_argument, help="default: results/kernels_DEVICE.csv beside this file"
    )
    parser.add_argument("--only", default="", help="run what has this in its name")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.85")  # torch takes some as well
    if current_platform() != "gpu" and not args.smoke:
        sys.exit(f"there is no GPU here (jax sees {current_platform()}); --smoke runs tiny shapes on a CPU")
    if args.verify:
        sys.exit(verify(args.smoke, deadline))
    rounds = 3 if args.smoke else args.rounds
    rates = timing.measure_rates(args.smoke, rounds)
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}: copy {rates.copy / 1e12:.3g} TB/s, "
        f"bfloat16 product {rates.matmul / 1e12:.3g} TFLOP/s",
        flush=True,
    )
    path = args.csv or RESULTS / f"kernels_{'smoke_' * args.smoke}{device_name()}.csv"
    rates_row = {"op": "rates", "shape": "large arrays", "peer": 0}
    rows: list[dict[str, Any]] = [
        rates_row | {"action": "copy", "implementation": "xla", "gb_per_second": rates.copy / 1e9},
        rates_row
        | {"action": "matmul", "implementation": "xla", "gb_per_second": None, "flops": rates.matmul},
    ]

    def measure(make: Callable[[], KernelCase]) -> list[dict[str, Any]]:
        return run_case(make(), rounds, rates)

    def measure_steps(run: Callable[[int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        return finish_steps(run(rounds), rates)

    jobs = [(label, functools.partial(measure, make)) for label, make in cases(args.smoke)]
    steps = [(label, functools.partial(measure_steps, run)) for label, run in kernel_steps.jobs(args.smoke)]
    # A whole step and an update early: what is of less importance may not all fit.
    jobs[5:5] = steps[:2]
    jobs += steps[2:]
    longest: dict[str, float] = {}  # seconds of the longest so far of each operation
    for label, job in jobs:
        if args.only not in label:
            continue
        start, op = time.monotonic(), label.split()[0]
        expected = 0.7 * longest[op] if op in longest else FIRST.get(op, OTHERS_FIRST) * (not args.smoke)
        if start + expected > deadline:
            print(f"left out, no time: {label}", flush=True)
            continue
        try:
            found = job()
        except Exception as error:  # say so, and go on with the next
            print(f"failed: {label}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            found = [{"op": label, "peer": 0, "note": f"{type(error).__name__}: {str(error)[:200]}"}]
        else:
            for row in found:
                show(row)
        rows += found
        write(path, rows)
        jax.clear_caches()
        longest[op] = max(longest.get(op, 0.0), time.monotonic() - start)
    print(f"wrote {path}")
    if wrong := sum(map(is_wrong, rows)):
        sys.exit(f"{wrong} answers are wrong: see the column note")


if __name__ == "__main__":
    main()
