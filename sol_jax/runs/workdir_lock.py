"""One run at a time in a workdir.

The operating system holds the lock for the process, and lets go of it when that ends in any way: nothing is
left behind that somebody must remove.  `flock` holds among the processes of a machine and, as Linux does it,
among those of an NFS share.  On an object store `object_lock` does it.
"""

import contextlib
import os
import pathlib
import socket
from collections.abc import Iterator

from absl import logging

from sol_jax.errors import UserError
from sol_jax.files import is_remote
from sol_jax.runs.object_lock import only_remote_run

LOCK = "lock"  # the file in a workdir


@contextlib.contextmanager
def only_run(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of a workdir, which is made if missing.

    Raises `UserError` if there is one, or if the workdir cannot be used.
    """
    if is_remote(workdir):
        with only_remote_run(workdir / LOCK):
            yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / LOCK, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed below)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise UserError(f"{workdir}: cannot be used as a workdir: {why}") from error
    with file:
        if not _taken(file.fileno(), workdir):
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise UserError(
                f"{workdir} is in use by {holder}; wait for it, or name another --workdir: two runs in one "
                "would write over each other"
            )
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def _taken(descriptor: int, workdir: pathlib.Path) -> bool:
    """Whether the lock is ours now; where the file system has none, it is, with a warning."""
    try:
        import fcntl
    except ImportError:
        logging.warning("%s: this system has no locks; start no second run there", workdir)
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logging.warning("%s: cannot be locked (%s); start no second run there", workdir, error.strerror)
    return True
