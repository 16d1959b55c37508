"""Measures every kernel beside its peers, and decode steps, generation and updates with and without them.

    python -m experiments.bench_kernels            # on a GPU; `make gpu-check` tests the kernels first
    python -m experiments.bench_kernels --smoke    # anywhere: tiny shapes, kernels interpreted on a CPU
    python -m experiments.bench_kernels --verify   # no times: every operation against float64

Needs jax, flax, optax and numpy; torch is a peer if it is there.  Times are medians of slopes (see `timing`),
of `--rounds` rounds in which what is compared takes turns; the copy and matmul rates are measured in the same
process.  What `--minutes` has no room for is named and left out.
"""

import argparse
import functools
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from experiments import kernel_steps, timing
from experiments.attention_cases import attention, bounds, shared_prefix
from experiments.kernel_cases import Case
from experiments.kernel_table import device_name, finish_steps, run_case, show, write
from experiments.mlp_cases import pruned_mlp, rounding
from pallas_kernels.dispatch import current_platform
from pallas_kernels.shapes import SHAPES, Shape

RESULTS = pathlib.Path(__file__).parent / "results"
KEEPS = (0.1, 0.3, 0.6, 1.0)
# Largest errors against float64 that the issue of the kernels allows, by dtype.
BOUND = {"bfloat16": 1e-2, "float32": 1e-5}
TINY = Shape("tiny", 64, 128, 4, 2, 16, 2, 64, 8)


def shape(name: str) -> Shape:
    return next(s for s in SHAPES if str(s) == name)


def cases(smoke: bool) -> list[tuple[str, Callable[[], Case]]]:
    """What is measured, the most important first; nothing is allocated before its turn."""
    if smoke:
        return [
            ("attend tiny", lambda: attention(TINY, (0.3, 1.0), smoke=True)),
            ("gated_hidden tiny", lambda: pruned_mlp(TINY, 1, (0.4,), smoke=True)),
            ("shared_prefix tiny", lambda: shared_prefix(TINY, 3, (0.5,), smoke=True)),
            ("quantize_residual tiny", lambda: rounding(TINY, 2, (5, 16), smoke=True)),
            ("page_bounds tiny", lambda: bounds(TINY, smoke=True)),
        ]
    model = "llama-3.1-8b"

    def attend(name: str) -> tuple[str, Callable[[], Case]]:
        return f"attend {name}", lambda: attention(shape(name), KEEPS)

    def gated(model: str, rows: int) -> tuple[str, Callable[[], Case]]:
        return f"gated_hidden {model} {rows} rows", lambda: pruned_mlp(
            shape(f"{model}-1x1024"), rows, (0.2, 0.4, 0.7)
        )

    def shared(name: str) -> tuple[str, Callable[[], Case]]:
        return f"shared_prefix {name}", lambda: shared_prefix(shape(name), 16, (0.3, 1.0))

    def quantize(rows: int) -> tuple[str, Callable[[], Case]]:
        return f"quantize_residual {rows} rows", lambda: rounding(shape(f"{model}-1x1024"), rows, (5, 16))

    return [
        attend(f"{model}-8x32768"),
        gated(model, 1),
        shared(f"{model}-8x1024"),
        attend(f"{model}-1x32768"),
        quantize(128),
        attend("llama-3.2-1b-8x131072"),
        gated(model, 2),
        gated("llama-3.2-1b", 1),
        attend("llama-3.2-1b-8x1024"),
        shared("llama-3.2-1b-8x1024"),
        quantize(1),
        attend("llama-3.2-1b-1x131072"),
        (f"page_bounds {model}-8x32768", lambda: bounds(shape(f"{model}-8x32768"))),
        gated(model, 8),
    ]


def verified(smoke: bool) -> list[tuple[str, Callable[[], Case]]]:
    """Every operation at shapes of every model, in both dtypes, small enough for a host's float64."""
    shapes = (TINY,) if smoke else tuple(s for s in SHAPES if (s.batch, s.context) == (8, 1024))

    def of(s: Shape, dtype: str) -> list[tuple[str, Callable[[], Case]]]:
        label = f"{s} {dtype}"
        return [
            (f"attend {label}", lambda: attention(s, (0.1, 1.0), dtype, smoke=True)),
            *(
                (f"gated_hidden {label} {n} rows", lambda n=n: pruned_mlp(s, n, (0.4,), dtype, smoke=True))
                for n in (1, 3)
            ),
            (f"shared_prefix {label}", lambda: shared_prefix(s, 4, (0.5,), dtype, smoke=True)),
            (f"page_bounds {label}", lambda: bounds(s, dtype, smoke=True)),
        ]

    rows = [(f"quantize_residual {s}", lambda s=s: rounding(s, 8, (2, 8, 16), smoke=True)) for s in shapes]
    return [case for s in shapes for dtype in BOUND for case in of(s, dtype)] + rows


def verify(smoke: bool, deadline: float) -> int:
    """Runs `verified`; the number of implementations that failed."""
    failed = 0
    with jax.default_matmul_precision("highest"):  # a GPU would round float32 operands to tensor floats
        for label, make in verified(smoke):
            if time.monotonic() > deadline:
                print(f"left out, no time: {label}", flush=True)
                continue
            bound = BOUND["bfloat16" if "bfloat16" in label else "float32"]
            for row in run_case(make(), 0, None):
                wrong = not row.get("error", math.inf) <= bound
                if not row["peer"] and wrong:
                    failed += 1
                    print(f"FAILED (above {bound:g})", end=" ")
                if not row["peer"]:
                    show(row)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="what there is no time for is left out")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds of each operation")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, few rounds; runs on a CPU")
    parser.add_argument("--verify", action="store_true", help="compare with float64 and measure nothing")
    parser.add_argument(
        "--csv", type=pathlib.Path, help="default: results/kernels_DEVICE.csv beside this file"
    )
    parser.add_argument("--only", default="", help="run what has this in its name")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.85")  # torch takes some as well
    if current_platform() != "gpu" and not args.smoke:
        sys.exit(f"there is no GPU here (jax sees {current_platform()}); --smoke runs tiny shapes on a CPU")
    if args.verify:
        failed = verify(args.smoke, deadline)
        sys.exit(f"{failed} implementations are wrong" if failed else 0)
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

    def measure(make: Callable[[], Case]) -> list[dict[str, Any]]:
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
        if start + 0.7 * longest.get(op, 20.0) > deadline:
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


if __name__ == "__main__":
    main()
