"""Runs that are killed, starved and damaged: each ends as an undisturbed one does, or says why not.

Every function here is one trial.  It draws from a generator of its own, and returns what was wrong.
"""

import os
import pathlib
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

from chaos.lab import LATEST, UPDATES, Lab


def kill(lab: Lab, number: int, rng: random.Random) -> str:
    """SIGKILL: at random moments, in saves, and (every fourth) while the first programs are compiled."""
    while True:
        workdir, kind = lab.fresh("killed"), number % 4
        if kind == 3:  # without what was compiled before
            process, after = lab.start(workdir, compiled=False), rng.uniform(0, 3 * lab.seconds)
        else:
            process, after = lab.start(workdir), rng.uniform(0, lab.seconds)
        if kind in (1, 2):
            in_a_save(workdir, rng.randrange(1, UPDATES), process)
            time.sleep(rng.choice((0, 0.001, 0.01, 0.05)))
        else:
            time.sleep(after)
        os.kill(process, signal.SIGKILL)
        code, _ = lab.wait(process)
        if code == -signal.SIGKILL:  # else it was done before
            return lab.other_end(workdir)


def in_a_save(workdir: pathlib.Path, step: int, process: int) -> None:
    """Waits until the save of a step has begun, or the process has ended."""
    late = time.monotonic() + LATEST
    while time.monotonic() < late and pathlib.Path(f"/proc/{process}/stat").read_text().split()[2] != "Z":
        if list((workdir / "checkpoints").glob(f"{step}.orbax-checkpoint-tmp*")):
            return
        time.sleep(0.001)


def storm(lab: Lab, number: int, rng: random.Random) -> str:
    """SIGTERM again and again; the next start goes on from where this one stopped."""
    workdir = lab.fresh("storm")
    process = lab.start(workdir)
    for _ in range(rng.randrange(2, 12)):
        time.sleep(rng.uniform(0, lab.seconds / 4))
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        os.kill(process, signal.SIGTERM)
    code, _ = lab.wait(process)
    # It is the signal's own end before there was anything to save, or after it all.
    wrong = "" if code in (0, -signal.SIGTERM) else f"ended with {code}: {lab.log()} "
    return wrong + lab.other_end(workdir)


def full_disk(lab: Lab, number: int, rng: random.Random) -> str:
    """No file may grow beyond a random number of bytes; then there is room again."""
    workdir, limit = lab.fresh("full"), int(2 ** rng.uniform(0, 17))

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, final = lab.run(workdir, before=fill)
    wrong = code not in (0, 2) or (code == 2 and "error: " not in lab.log()) or (final and final != lab.final)
    if limit < 4000 and code in (0, 2):  # the log is a file too, so the error may be cut
        wrong = False
    told = f"disk of {limit} bytes: ended with {code}: {lab.log()} " if wrong else ""
    return told + lab.other_end(workdir)


DAMAGES: dict[str, Callable[[pathlib.Path], Any]] = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "gone": lambda file: file.unlink(),
    "flipped": lambda file: file.write_bytes(flipped(file.read_bytes())),
}


def flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes(255 - byte for byte in content[at : at + 1]) + content[at + 1 :]


def half_done(lab: Lab) -> pathlib.Path:
    """The workdir of a run that stopped half way."""
    half = lab.folder / "runs" / "half"
    if not half.exists():
        lab.run(half, updates=UPDATES // 2)
    return half


def damage_cases(lab: Lab) -> list[tuple[pathlib.Path, str]]:
    """Each file of a workdir, with each damage."""
    half = half_done(lab)
    files = sorted(path.relative_to(half) for path in half.rglob("*") if path.is_file())
    return [(file, name) for file in files for name in DAMAGES]


def damaged(lab: Lab, number: int, rng: random.Random) -> str:
    """The run ends as it would have, or says what is wrong."""
    (file, name), workdir = damage_cases(lab)[number], lab.fresh("damaged")
    shutil.copytree(half_done(lab), workdir)
    DAMAGES[name](workdir / file)
    code, final = lab.run(workdir)
    if (code == 0 and final == lab.final) or (code == 2 and lab.told()):
        return ""
    return f"{file} {name}: ended with {code}{': ' + lab.log() if code else ', another end'}"


def unwritable(lab: Lab, number: int, rng: random.Random) -> str:
    """A folder that may be read alone; root may write everywhere, so the run is somebody else's."""
    workdir = lab.fresh("locked")
    lab.run(workdir, updates=UPDATES // 2)
    for path in [workdir, *workdir.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def as_nobody() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)

    code, _ = lab.run(workdir, before=as_nobody)
    wrong = "" if code == 2 and lab.told() else f"ended with {code}: {lab.log()} "
    for path in [workdir, *workdir.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return wrong + lab.other_end(workdir)


def slow_disk(lab: Lab, number: int, rng: random.Random) -> str:
    """Folders in which making, renaming and removing takes its time; every second run is killed, too."""
    workdir, seed = lab.fresh("slow"), rng.random()

    def slow() -> None:
        for name in ("replace", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, slowed(getattr(os, name), random.Random(seed)))

    process = lab.start(workdir, before=slow)
    if number % 2:
        time.sleep(rng.uniform(0, 2 * lab.seconds))
        os.kill(process, signal.SIGKILL)
    code, final = lab.wait(process)
    wrong = code != 0 if not number % 2 else code not in (0, -signal.SIGKILL)
    if wrong or (code == 0 and final != lab.final):
        return f"ended with {code}: {lab.log() if code else 'another end'}"
    return lab.other_end(workdir)


def slowed(call: Callable, rng: random.Random) -> Callable:
    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(rng.uniform(0, 0.1))
        return call(*args, **kwargs)

    return late


def clock(lab: Lab, number: int, rng: random.Random) -> str:
    """A clock that jumps by years at every look, and files of any time."""
    workdir, seed = lab.fresh("clock"), rng.random()

    def jump() -> None:
        jumps, right = random.Random(seed), time.time
        time.time = lambda: max(0.0, right() + jumps.choice((-1e9, -3600.0, 0.0, 3600.0, 1e9)))

    for updates in (UPDATES // 2, UPDATES):
        code, final = lab.run(workdir, before=jump, updates=updates)
        for path in workdir.rglob("*"):
            when = rng.randrange(0, 4 * 10**9)
            os.utime(path, (when, when))
    # Orbax waits by this clock, so a save may be late by it: that must be told, and nothing lost.
    right = (code == 2 and lab.told()) or (code == 0 and final == lab.final)
    return ("" if right else f"ended with {code}: {lab.log()} ") + lab.other_end(workdir)
