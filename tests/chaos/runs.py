"""Runs that are killed, starved and damaged: each ends as an undisturbed one does, or says why not.

Every run is a process of its own, forked from one that has imported everything and computed nothing.
"""

import dataclasses
import hashlib
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import tiny

from sol_jax.errors import UserError
from sol_jax.runs.config import RunConfig
from sol_jax.text import tfds_builder  # noqa: F401 (for the runs, which would import it each)
from sol_jax.training import estimate, loop
from sol_jax.training.loop import Interrupted

UPDATES = 6
LATEST = 300.0  # seconds that a run may take


@dataclasses.dataclass
class Lab:
    """A folder with a tiny model and corpus, an undisturbed run, and what it ended with."""

    folder: pathlib.Path
    rng: random.Random
    told: list[str] = dataclasses.field(default_factory=list)
    final: str = ""
    seconds: float = 0.0

    def config(self, updates: int = UPDATES) -> RunConfig:
        """A policy over rho alone, and no Quest: less to trace, which takes most of the time of a run."""
        fields = {"train.checkpoint_every": 1, "eval.every": 0, "eval.num_test_blocks": 0, "train.keep": 2}
        fields |= {"axes.kappa.levels": (1.0,), "axes.eta.levels": (16,), "axes.kappa.rule": "recency"}
        fields |= {"policy.num_layers": 1}
        return tiny.config_for(self.folder, **fields, **{"train.num_updates": updates})

    def prepare(self) -> None:
        """The undisturbed run; a second one gives the time that it takes when it need not compile."""
        tiny.save_model(self.folder / "model")
        tiny.save_corpus(self.folder / "corpus.jsonl")
        for name in ("whole", "again"):
            began = time.monotonic()
            code, self.final = self.run(self.folder / name)
            self.seconds = time.monotonic() - began
            if code != 0:
                raise RuntimeError(f"the undisturbed run ended with {code}: {self.log()}")

    def start(
        self,
        workdir: pathlib.Path,
        before: Callable[[], Any] | None = None,
        updates: int = UPDATES,
        compiled: bool = True,
    ) -> int:
        """Starts a run; returns its process' number."""
        (self.folder / "final").unlink(missing_ok=True)
        sys.stdout.flush()
        number = os.fork()
        if number:
            return number
        code = 1
        try:  # the child: nothing may return from here
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            import jax

            if compiled:
                jax.config.update("jax_compilation_cache_dir", str(self.folder / "compiled"))
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            if before is not None:
                before()
            loop.validate, loop.matmul_rate = validated, lambda dtype: 1e10
            estimate.matmul_rate = loop.matmul_rate
            state = loop.train(self.config(updates), workdir)
            (self.folder / "final").write_text(digest(state))
            code = 0
        except Interrupted:
            code = 0
        except UserError as error:
            print(f"error: {error}", flush=True)
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, number: int) -> tuple[int, str]:
        """How a process ended, and what its state came to; empty if it did not get to the end."""
        late = time.monotonic() + LATEST
        while time.monotonic() < late:
            ended, status = os.waitpid(number, os.WNOHANG)
            if ended:
                final = self.folder / "final"
                return os.waitstatus_to_exitcode(status), final.read_text() if final.exists() else ""
            time.sleep(0.005)
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        return -1000, ""

    def run(self, workdir: pathlib.Path, **options: Any) -> tuple[int, str]:
        return self.wait(self.start(workdir, **options))

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def expect_same_end(self, what: str, workdir: pathlib.Path) -> None:
        """Goes on to the end, however often it takes, and compares."""
        for _ in range(3):
            code, final = self.run(workdir)
            if code != 0 or final:
                break
        if code != 0 or final != self.final:
            self.told.append(f"{what}: {'another end' if code == 0 else f'ended with {code}: {self.log()}'}")

    def progress(self, what: str) -> None:
        """What was just done, on a line that is no result."""
        print(f"{what} done, {len(self.told)} wrong", file=sys.stderr, flush=True)

    def fresh(self, name: str) -> pathlib.Path:
        workdir = self.folder / "runs" / name
        shutil.rmtree(workdir, ignore_errors=True)
        return workdir


def validated(session: Any, state: Any) -> dict[str, float]:
    """In place of the validation, whose programs would take as long as all else; checkpoints get scores."""
    return {"eval/score": float(state.step), "eval/budget_gap/rho": 0.0}


def digest(state: Any) -> str:
    """sha256 of all arrays of a state."""
    import jax

    sha256 = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        sha256.update(np.asarray(leaf).tobytes())
    return sha256.hexdigest()


# --- kills -----------------------------------------------------------------------------------------------


def kills(lab: Lab, count: int) -> int:
    """SIGKILL at random moments, in saves, and while the first programs are compiled; returns how many."""
    done = 0
    while done < count:
        workdir, kind = lab.fresh("killed"), done % 4
        if kind == 3:  # without what was compiled before
            number, after = lab.start(workdir, compiled=False), lab.rng.uniform(0, 3 * lab.seconds)
        else:
            number, after = lab.start(workdir), lab.rng.uniform(0, lab.seconds)
        if kind in (1, 2):
            in_a_save(workdir, lab.rng.randrange(1, UPDATES), number)
            time.sleep(lab.rng.choice((0, 0.001, 0.01, 0.05)))
        else:
            time.sleep(after)
        os.kill(number, signal.SIGKILL)
        code, _ = lab.wait(number)
        if code == -signal.SIGKILL:  # else it was done before
            done += 1
            lab.expect_same_end(f"kill {done}", workdir)
            lab.progress(f"kill {done}")
    return done


def in_a_save(workdir: pathlib.Path, step: int, number: int) -> None:
    """Waits until the save of a step has begun, or the process has ended."""
    late = time.monotonic() + LATEST
    while time.monotonic() < late and pathlib.Path(f"/proc/{number}/stat").read_text().split()[2] != "Z":
        if list((workdir / "checkpoints").glob(f"{step}.orbax-checkpoint-tmp*")):
            return


def storms(lab: Lab, count: int) -> None:
    """SIGTERM again and again; each start goes on from where the last one stopped."""
    for trial in range(count):
        workdir = lab.fresh("storm")
        number = lab.start(workdir)
        for _ in range(lab.rng.randrange(2, 12)):
            time.sleep(lab.rng.uniform(0, lab.seconds / 4))
            if os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            os.kill(number, signal.SIGTERM)
        code, _ = lab.wait(number)
        if code not in (0, -signal.SIGTERM):  # the latter before there was anything to save, or after it all
            lab.told.append(f"storm {trial}: ended with {code}: {lab.log()}")
        lab.expect_same_end(f"storm {trial}", workdir)


# --- disks -----------------------------------------------------------------------------------------------


def full_disks(lab: Lab, count: int) -> None:
    """No file may grow beyond a random number of bytes; then there is room again."""
    for _ in range(count):
        workdir, limit = lab.fresh("full"), int(2 ** lab.rng.uniform(0, 17))

        def fill(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        code, final = lab.run(workdir, before=fill)
        if code not in (0, 2) or (code == 2 and "error: " not in lab.log()) or (final and final != lab.final):
            # The log is a file too, so the error may be cut.
            cut = limit < 4000 and code in (0, 2)
            lab.told.extend([] if cut else [f"disk of {limit} bytes: ended with {code}: {lab.log()}"])
        lab.expect_same_end(f"disk of {limit} bytes", workdir)


DAMAGES: dict[str, Callable[[pathlib.Path], Any]] = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "gone": lambda file: file.unlink(),
    "flipped": lambda file: file.write_bytes(flipped(file.read_bytes())),
}


def flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes(255 - byte for byte in content[at : at + 1]) + content[at + 1 :]


def damages(lab: Lab, every: int = 1) -> int:
    """Each file of a workdir, in turn: the run ends as it would have, or says what is wrong."""
    half = lab.fresh("half")
    lab.run(half, updates=UPDATES // 2)
    files = sorted(path.relative_to(half) for path in half.rglob("*") if path.is_file())
    cases = [(file, name) for file in files for name in DAMAGES]
    chosen = cases[lab.rng.randrange(every) :: every]
    for file, name in chosen:
        workdir = lab.fresh("damaged")
        shutil.copytree(half, workdir)
        DAMAGES[name](workdir / file)
        code, final = lab.run(workdir)
        right = code == 0 and final == lab.final
        told = code == 2 and lab.log().strip().splitlines()[-1].startswith("error: ")
        if not right and not told:
            lab.told.append(
                f"{file} {name}: ended with {code}{': ' + lab.log() if code else ', another end'}"
            )
    return len(chosen)


def unwritable(lab: Lab) -> None:
    """A folder that may be read alone; root may write everywhere, so the run is somebody else's."""
    workdir = lab.fresh("locked")
    lab.run(workdir, updates=UPDATES // 2)
    for path in [workdir, *workdir.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def as_nobody() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)

    code, _ = lab.run(workdir, before=as_nobody)
    if code != 2:
        lab.told.append(f"a folder that may not be written: ended with {code}: {lab.log()}")
    for path in [workdir, *workdir.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    lab.expect_same_end("a folder that could not be written", workdir)


def slow_disks(lab: Lab, count: int) -> None:
    """Folders in which making, renaming and removing takes its time; killed in the middle, too."""
    for trial in range(count):
        workdir, seed = lab.fresh("slow"), lab.rng.random()

        def slow(seed: float = seed) -> None:
            for name in ("replace", "rename", "mkdir", "unlink", "rmdir"):
                setattr(os, name, slowed(getattr(os, name), random.Random(seed)))

        number = lab.start(workdir, before=slow)
        if trial % 2:
            time.sleep(lab.rng.uniform(0, 2 * lab.seconds))
            os.kill(number, signal.SIGKILL)
        code, final = lab.wait(number)
        if code == 0 and final != lab.final:
            lab.told.append(f"slow disk {trial}: another end")
        lab.expect_same_end(f"slow disk {trial}", workdir)


def slowed(call: Callable, rng: random.Random) -> Callable:
    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(rng.uniform(0, 0.1))
        return call(*args, **kwargs)

    return late


def clocks(lab: Lab, count: int) -> None:
    """A clock that jumps by years at every look, and files of any time."""
    for trial in range(count):
        workdir, seed = lab.fresh("clock"), lab.rng.random()

        def jump(seed: float = seed) -> None:
            rng, right = random.Random(seed), time.time
            time.time = lambda: max(0.0, right() + rng.choice((-1e9, -3600.0, 0.0, 3600.0, 1e9)))

        for updates in (UPDATES // 2, UPDATES):
            code, final = lab.run(workdir, before=jump, updates=updates)
            for path in workdir.rglob("*"):
                when = lab.rng.randrange(0, 4 * 10**9)
                os.utime(path, (when, when))
        # Orbax waits by this clock, so a save may be late by it: that must be told, and nothing lost.
        told = code == 2 and lab.log().strip().splitlines()[-1].startswith("error: ")
        if not told and (code != 0 or final != lab.final):
            lab.told.append(f"clock {trial}: ended with {code}: {lab.log()}")
        lab.expect_same_end(f"clock {trial}", workdir)
