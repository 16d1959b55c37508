"""One run at a time in a workdir on an object store, which has no locks.

A run keeps an object, `lock`, and writes it anew every `BEAT` seconds.  Who finds one watches it: if it
changes, its run lives, and the other is refused; if it stays as it is for `DEAD` seconds its run is dead, and
it is taken.  No clocks are compared.  Two that start in the same moment both write; the one whose lock is
overwritten gives way, at once or at its next beat.  So is a run that was suspended for longer than `DEAD` and
has lost its workdir to another.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from absl import logging

from sol_jax.errors import UserError
from sol_jax.files import as_os_errors, parse_json, write_whole

BEAT = 10.0  # seconds between two writes of a run that lives
DEAD = 45.0  # seconds without one, after which its run is taken for dead
SETTLE = 1.0  # seconds until a run looks whether another has begun in the same moment


@contextlib.contextmanager
def only_remote_run(file: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of the workdir of the lock `file`.

    Raises `UserError` if there is one, within `BEAT` seconds and the time of some reads; if the workdir
    cannot be used; and, in place of whatever is going on, if another run has taken the workdir meanwhile.
    """
    beat = _Heartbeat(file)
    try:
        _wait_until_free(file)
        beat.write()
        time.sleep(SETTLE)
        if not beat.is_ours():
            raise _in_use(file, _read(file))
    except OSError as error:
        raise UserError(f"{file.parent}: cannot be used as a workdir: {error.strerror or error}") from error
    beat.start()
    try:
        try:
            yield
        finally:
            beat.stop()
    except _LostError:
        raise UserError(
            f"{file.parent}: {_holder(_read(file))} has taken this workdir, for this run gave no sign of "
            f"life for {DEAD:g} s; it stops here, and what came after its last checkpoint is lost"
        ) from None


class _LostError(BaseException):
    """Another run has taken the workdir.  Raised amid things, and not for `except Exception` to hold."""


class _Heartbeat(threading.Thread):
    """Writes the lock anew until it is stopped, or finds that it is another's: then it stops the run."""

    def __init__(self, file: pathlib.Path):
        super().__init__(name="workdir lock", daemon=True)
        self._file, self._stopped = file, threading.Event()
        self._run, self._beats = uuid.uuid4().hex, 0
        self.lost, self._owner = False, threading.get_ident()

    def write(self) -> None:
        self._beats += 1
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        # Always of one length: a store that remembers sizes then gives no half of it.
        text = json.dumps({"holder": holder, "run": self._run, "beat": f"{self._beats:012}"})
        write_whole(self._file, text)

    def is_ours(self) -> bool:
        return self._run in (_read(self._file) or "")

    def run(self) -> None:
        while not self._stopped.wait(BEAT):
            try:
                found = _read(self._file)
                if found is not None and self._run not in found:  # one that was deleted is written anew
                    self.lost = True
                    # Not by SIGINT, which shells have the programs ignore that they start in the background.
                    owner, error = ctypes.c_ulong(self._owner), ctypes.py_object(_LostError)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(owner, error)
                    return
                self.write()
            except OSError as error:  # the network: the next beat may come through
                logging.warning("%s: cannot be renewed: %s", self._file, error)

    def stop(self) -> None:
        self._stopped.set()
        self.join()
        with contextlib.suppress(OSError), as_os_errors():  # else the next run waits for `DEAD` seconds
            if not self.lost and self.is_ours():
                self._file.unlink(missing_ok=True)


def _wait_until_free(file: pathlib.Path) -> None:
    """Returns when there is no lock, or that of a dead run."""
    seen, since = _read(file), time.monotonic()
    if seen is not None:
        logging.warning("%s is of %s; within %g s it shows whether that run lives", file, _holder(seen), DEAD)
    while seen is not None and time.monotonic() - since < DEAD:
        time.sleep(min(1.0, BEAT / 4))
        now = _read(file)
        if now is not None and now != seen:
            raise _in_use(file, now)
        seen = now


def _in_use(file: pathlib.Path, text: str | None) -> UserError:
    return UserError(
        f"{file.parent} is in use by {_holder(text)}; wait for it, or name another --workdir: two runs in "
        "one would write over each other"
    )


def _holder(text: str | None) -> str:
    try:
        return str(parse_json(text or "")["holder"])[:200]
    except (ValueError, KeyError, TypeError):
        return "another process"


def _read(file: pathlib.Path) -> str | None:
    with as_os_errors():
        try:
            return file.read_bytes().decode(errors="replace")
        except FileNotFoundError:
            return None
