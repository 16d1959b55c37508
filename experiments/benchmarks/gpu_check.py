"""Tests the kernels on this machine's GPU, then measures them, and generation; `make gpu-check`.

    python -m experiments.benchmarks.gpu_check --minutes 8

Needs jax (with CUDA), flax, optax and numpy; takes torch, triton, pytest and hypothesis if they are there.
Every operation is compared with float64 as well, for longer without pytest or hypothesis.  The tables are
written to experiments/results, kernels_DEVICE.csv and generation_DEVICE.csv.  With --smoke the same steps run
on tiny shapes, on a CPU too.  The exit status is 1 if anything failed, 75 if the tests were cut short.
"""

import argparse
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Sequence

from experiments import RESULTS

# Lowering for devices that are elsewhere, and races in an interpreter, need no GPU.
TESTS = ("-m", "pytest", "tests/kernels", "--maxfail=10", "-q", "-k", "not lower and not race and not tpu")
PROBE = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind)"
# Without first tokens, for which the engine needs more packages than the kernels do.
GENERATION = (
    "-m",
    "experiments.benchmarks.generate",
    "--batch_sizes",
    "8",
    "--prompts",
    "256",
    "--first_batches",
)
# Of all the time, at most these shares for the tests, the comparison with float64 and generation.
TESTING, COMPARING, GENERATING = 0.25, 0.12, 0.18
INCOMPLETE = 75  # exit status of a step that time did not suffice for, where nothing failed; none of pytest's
SAID = {0: "passed", 1: "FAILED", INCOMPLETE: "incomplete"}


def generation_csv(args: argparse.Namespace, device: str) -> pathlib.Path | None:
    """Where generation's table goes: beside the kernels' if that was named; of tiny shapes nowhere else."""
    if args.csv:
        return pathlib.Path(args.csv).with_name(f"generation_{pathlib.Path(args.csv).name}")
    name = re.sub(r"\W+", "_", device.lower().replace("nvidia", "").strip())
    return None if args.smoke else RESULTS / f"generation_{name}.csv"


def step(command: Sequence[str], seconds: float, rest: str) -> int:
    """Exit status of a step: 0, 1, or INCOMPLETE if it is stopped in so many seconds; the `rest` is named."""
    # Flags of XLA that suit the tests on a CPU (tests/conftest.py) are not for here.
    own = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    try:
        status = subprocess.run([sys.executable, *command], timeout=seconds, env=own).returncode
    except subprocess.TimeoutExpired:
        print(f"left out, no time: {rest}", flush=True)
        return INCOMPLETE
    return status if status in SAID else 1


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
    found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=left())
    backend, _, device = found.stdout.strip().partition(" ")
    if backend != "gpu" and not (args.smoke and backend):
        problem = f"jax sees {backend}" if backend else f"jax fails: {found.stderr.strip().splitlines()[-1]}"
        sys.exit(f"make gpu-check needs a GPU, and there is none here ({problem})")
    print(f"{device}: tests, then benchmarks, {args.minutes:g} minutes in all", flush=True)
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    bench = ("-m", "experiments.benchmarks.kernels", *["--smoke"] * args.smoke)
    testing, comparing, generating = (60 * args.minutes * share for share in (TESTING, COMPARING, GENERATING))
    tested, untested = 0, bool(missing) or args.smoke
    if missing:
        print(f"no {' and no '.join(missing)}: every operation is compared with float64 instead", flush=True)
    if untested:
        comparing += testing
    else:
        tested = step(TESTS, testing, f"the tests that had not run after {testing:.0f} s")
    # The comparison keeps its own time, but for the operation that it is in.
    compare = (*bench, "--verify", "--minutes", str(comparing / 60))
    compared = step(compare, min(comparing + 30, max(left(), 30)), "the rest of the comparison with float64")
    minutes = str(max(left() - generating - 15, 30) / 60)
    table = ("--csv", args.csv) if args.csv else ()
    measuring = max(left() - generating, 45)
    measured = step((*bench, "--minutes", minutes, *table), measuring, "what the table of kernels lacks")
    path = generation_csv(args, device)
    generation = (*GENERATION, *["--smoke"] * args.smoke, *(("--csv", str(path)) if path else ()))
    generated = step(generation, max(left() - 5, 30), "what generation had not measured")
    tests = "" if untested else f"tests {SAID[tested]}, "
    print(
        f"{tests}comparison with float64 {SAID[compared]}; {60 * args.minutes - left():.0f} s in all",
        flush=True,
    )
    failed = 1 in (tested, compared, measured, generated)
    # Measurements that there is no time for are left out by design.
    sys.exit(1 if failed else compared if untested else tested)


if __name__ == "__main__":
    main()
