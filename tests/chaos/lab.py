"""A place for runs: each is a process, forked from one that has imported everything and computed nothing."""

import contextlib
import dataclasses
import gc
import hashlib
import os
import pathlib
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
        if not (self.folder / "corpus.jsonl").exists():
            tiny.save_model(self.folder / "model")
            tiny.save_corpus(self.folder / "corpus.jsonl")
        for name in ("whole", "again")[(self.folder / "compiled").exists() :]:
            shutil.rmtree(self.folder / name, ignore_errors=True)
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
            gc.disable()  # a quarter of the time that tracing takes
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
            code = 2
            with contextlib.suppress(OSError):  # on a full disk the log has no room either
                print(f"error: {error}", flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            os._exit(code)

    def wait(self, number: int) -> tuple[int, str]:
        """How a process ended, and what its state came to; empty if it did not get to the end."""
        late = time.monotonic() + LATEST
        while time.monotonic() < late:
            ended, status = os.waitpid(number, os.WNOHANG)
            if ended:
                final = self.folder / "final"
                return os.waitstatus_to_exitcode(status), final.read_text() if final.exists() else ""
            time.sleep(0.02)
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        return -1000, ""

    def run(self, workdir: pathlib.Path, **options: Any) -> tuple[int, str]:
        return self.wait(self.start(workdir, **options))

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def other_end(self, workdir: pathlib.Path) -> str:
        """Goes on to the end, however often it takes, and compares; empty if it is the right one."""
        for _ in range(3):
            code, final = self.run(workdir)
            if code != 0 or final:
                break
        if code == 0 and final == self.final:
            return ""
        return "then another end" if code == 0 else f"then ended with {code}: {self.log()}"

    def told(self) -> bool:
        """Whether the last line of the latest run is one sentence about an error."""
        lines = self.log().strip().splitlines()
        return bool(lines) and lines[-1].startswith("error: ")

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
