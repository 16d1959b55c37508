"""Tests the kernels on this machine's GPU, then measures them; `make gpu-check`.

    python -m experiments.gpu_check --minutes 8

Needs jax (with CUDA), flax, optax and numpy; takes torch, triton, pytest and hypothesis if they are there.
Without pytest or hypothesis every operation is compared with float64 instead.  The table is written to
experiments/results/kernels_DEVICE.csv.  With --smoke the same steps run on tiny shapes, on a CPU too.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time

# Lowering for devices that are elsewhere, and races in an interpreter, need no GPU.
TESTS = ("-m", "pytest", "tests/kernels", "-x", "-q", "-k", "not lower and not race and not tpu")
PROBE = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind)"
# Of all the time, at most this share for the tests.
TESTING = 0.35


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, anywhere, without pytest")
    parser.add_argument("--csv", help="default: experiments/results/kernels_DEVICE.csv")
    args = parser.parse_args()
    start = time.monotonic()

    def left() -> float:
        return 60 * args.minutes - (time.monotonic() - start)

    # Each step is a process: one that holds the GPU's memory leaves none to the next.
    found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    backend, _, device = found.stdout.strip().partition(" ")
    if backend != "gpu" and not (args.smoke and backend):
        problem = f"jax sees {backend}" if backend else f"jax fails: {found.stderr.strip().splitlines()[-1]}"
        sys.exit(f"make gpu-check needs a GPU, and there is none here ({problem})")
    print(f"{device}: tests, then benchmarks, {args.minutes:g} minutes in all", flush=True)
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    bench = ("-m", "experiments.bench_kernels", *["--smoke"] * args.smoke)
    testing = TESTING * 60 * args.minutes
    compare = bool(missing) or args.smoke
    if missing:
        print(f"no {' and no '.join(missing)}: every operation is compared with float64 instead", flush=True)
    tests = (*bench, "--verify", "--minutes", str(testing / 60)) if compare else TESTS
    failed = False
    try:
        # The comparison keeps its own time, but for the operation that it is in.
        # Flags of XLA that suit the tests on a CPU (tests/conftest.py) are not for here.
        own = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
        run = subprocess.run([sys.executable, *tests], timeout=testing + 30 * compare, env=own)
        failed = run.returncode != 0
    except subprocess.TimeoutExpired:
        print(f"left out, no time: the tests that had not run after {testing:.0f} s", flush=True)
    minutes = str(max(left() - 15, 30) / 60)
    table = ("--csv", args.csv) if args.csv else ()
    measured = subprocess.run([sys.executable, *bench, "--minutes", minutes, *table])
    print(f"tests {'FAILED' if failed else 'passed'}; {60 * args.minutes - left():.0f} s in all", flush=True)
    sys.exit(1 if failed or measured.returncode else 0)


if __name__ == "__main__":
    main()
