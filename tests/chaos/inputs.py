"""Mutated inputs for every reader: each is read, or refused in one sentence, in little time and memory.

Inputs are functions of their number, so that one that fails can be looked at again:

    python -m chaos.inputs --only 1234
"""

import argparse
import faulthandler
import json
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

from chaos.mutations import mutated
from chaos.subjects import SUBJECTS

SECONDS = 10  # that an input may take
GIGABYTE = 1 << 30  # of memory that it may take, and twice its size besides


class TooLate(BaseException):
    """Of the alarm: nothing catches it by accident."""


def peak(reset: bool = False) -> int:
    """Bytes of memory at the most, since it was last reset."""
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def attempt(number: int, folder: pathlib.Path, seed: int) -> str:
    """What is wrong with how an input is read; empty if nothing."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(list(SUBJECTS))
    subject = SUBJECTS[name]
    good, work = folder / "good" / name.replace(" ", "-"), folder / "work"
    if not good.exists():
        good.mkdir(parents=True)
        subject.make(good)
        subject.read(copied(good, work))  # else what is wrong already would hide what mutations do
    copied(good, work)
    content = mutated((work / subject.file).read_bytes(), rng)
    (work / subject.file).write_bytes(content)
    if name == "digests":
        content = content.replace(bytes(good), bytes(work))
    wrong, before, began = "", peak(reset=True), time.monotonic()
    signal.alarm(SECONDS)
    try:
        subject.read(work)
    except TooLate:
        wrong = f"more than {SECONDS} s"
    except BaseException as fault:
        wrong = judged(fault)
    finally:
        signal.alarm(0)
    if not wrong and time.monotonic() - began > SECONDS:  # somebody took the alarm for an error of a file
        wrong = f"more than {SECONDS} s"
    taken = peak() - before
    if taken > 2 * len(content) + GIGABYTE:
        wrong += f" {taken >> 20} MB for {len(content)} bytes"
    return f"{name}: {wrong}" if wrong else ""


def copied(good: pathlib.Path, work: pathlib.Path) -> pathlib.Path:
    """`work` with what `good` has, and nothing else."""
    shutil.rmtree(work, ignore_errors=True)
    return shutil.copytree(good, work)


def judged(fault: BaseException) -> str:
    """Empty for one sentence to the user."""
    from sol_jax.errors import UserError

    if isinstance(fault, UserError):
        message = str(fault)
        return "" if "\n" not in message and len(message) < 1000 else f"no sentence: {message[:300]!r}"
    if isinstance(fault, KeyboardInterrupt):
        raise fault
    last = traceback.extract_tb(fault.__traceback__)[-1]
    return f"{type(fault).__name__}: {str(fault)[:200]} ({last.filename}:{last.lineno})"


def work(numbers: range, seed: int) -> None:
    """Reads inputs, and says of each that it begins and what is wrong."""

    def late(*_: Any) -> None:
        raise TooLate

    signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            print(json.dumps({"begin": number}), flush=True)
            # Code that is not Python's does not see the alarm.
            faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
            if wrong := attempt(number, pathlib.Path(folder), seed):
                print(json.dumps({"number": number, "wrong": wrong}), flush=True)


def run(count: int, seed: int = 0, first: int = 0) -> list[str]:
    """Reads inputs in a process of its own, which may crash, and says what is wrong with which."""
    wrong, done = [], first
    while done < first + count:
        command = [
            sys.executable,
            "-m",
            "chaos.inputs",
            "--worker",
            str(done),
            str(first + count),
            "--seed",
            str(seed),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        begun = done
        for line in process.stdout:
            told = json.loads(line)
            if "begin" in told:
                begun = told["begin"]
            else:
                wrong.append(f"input {told['number']}: {told['wrong']}")
        if process.wait() != 0:
            wrong.append(f"input {begun}: the process ended with {process.returncode}")
        done = begun + 1
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=int, nargs=2)
    parser.add_argument("--only", type=int)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.worker:
        work(range(*args.worker), args.seed)
    elif args.only is not None:
        work(range(args.only, args.only + 1), args.seed)
    else:
        began = time.monotonic()
        found = run(args.count, args.seed)
        print("\n".join(found))
        print(f"{len(found)} of {args.count} inputs were read wrongly, in {time.monotonic() - began:.0f} s")
