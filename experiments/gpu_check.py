"""Tests the kernels on this machine's GPU, then measures them; `make gpu-check`.

    python -m experiments.gpu_check --minutes 8

Needs jax (with CUDA), flax, optax and numpy; takes torch, triton, pytest and hypothesis if they are there.
Without pytest or hypothesis every operation is compared with float64 instead.  The table is written to
experiments/results/kernels_DEVICE.csv.
"""

import argparse
import importlib.util
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
    args = parser.parse_args()
    start = time.monotonic()

    def left() -> float:
        return 60 * args.minutes - (time.monotonic() - start)

    # Each step is a process: one that holds the GPU's memory leaves none to the next.
    found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    backend, _, device = found.stdout.strip().partition(" ")
    if backend != "gpu":
        problem = f"jax sees {backend}" if backend else f"jax fails: {found.stderr.strip().splitlines()[-1]}"
        sys.exit(f"make gpu-check needs a GPU, and there is none here ({problem})")
    print(f"{device}: tests, then benchmarks, {args.minutes:g} minutes in all", flush=True)
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    bench = ("-m", "experiments.bench_kernels")
    testing = TESTING * 60 * args.minutes
    if missing:
        print(f"no {' and no '.join(missing)}: every operation is compared with float64 instead", flush=True)
        tests: tuple[str, ...] = (*bench, "--verify", "--minutes", str(testing / 60))
    else:
        tests = TESTS
    failed = False
    try:
        # The comparison keeps its own time, but for the operation that it is in.
        run = subprocess.run([sys.executable, *tests], timeout=testing + 30 * bool(missing))
        failed = run.returncode != 0
    except subprocess.TimeoutExpired:
        print(f"left out, no time: the tests that had not run after {testing:.0f} s", flush=True)
    minutes = str(max(left() - 15, 30) / 60)
    measured = subprocess.run([sys.executable, *bench, "--minutes", minutes])
    print(f"tests {'FAILED' if failed else 'passed'}; {60 * args.minutes - left():.0f} s in all", flush=True)
    sys.exit(1 if failed or measured.returncode else 0)


if __name__ == "__main__":
    main()
