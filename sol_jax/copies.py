"""Copies between object stores and this machine, for libraries that know files of this machine alone."""

import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Sequence

from sol_jax.errors import UserError
from sol_jax.files import as_os_errors, stamp
from sol_jax.notices import notice

PIECE = 1 << 24  # bytes that are held at a time
ABANDONED = 24 * 3600.0  # seconds after which an unfinished copy is one that was killed


def fetch(files: Sequence[pathlib.Path], folder: pathlib.Path, name: str) -> pathlib.Path:
    """`folder`, with copies of remote files in it; where it is there already nothing is read.

    It gets its name when all files are whole.  Raises `UserError`, naming the flag or field, if they cannot
    be read or the disk has no room.
    """
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        with as_os_errors():
            unfinished.mkdir(parents=True, exist_ok=True)
            _sweep(folder.parent)
            sizes = {file: stamp(file)[0] for file in files}
            room, needed = shutil.disk_usage(unfinished).free, sum(sizes.values())
            if needed > room:
                raise UserError(
                    f"{name}: copies take {needed / 1e9:.2f} GB, and {folder.parent} has room for "
                    f"{room / 1e9:.2f} GB; free some space"
                )
            where = files[0].parent if files else ""
            notice(f"copying {needed / 1e9:.2f} GB from {where} to {folder}")
            for file, size in sizes.items():
                _copy(file, unfinished / file.name)
                if (found := stamp(unfinished / file.name)[0]) != size:
                    raise OSError(f"{file} came with {found} of {size} bytes")
            unfinished.rename(folder)
    except OSError as error:
        if folder.is_dir():  # another process was faster, and has copied the same
            return folder
        raise UserError(
            f"{name} could not be copied to {folder.parent} ({error.strerror or error}); "
            "free some space there, or start again"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def send(folder: pathlib.Path, target: pathlib.Path, last: str) -> None:
    """Copies the files of a folder to an object store; where the file `last` is, all are.  Raises OSError."""
    files = sorted(folder.iterdir(), key=lambda file: (file.name == last, file.name))
    with as_os_errors():
        for file in files:
            _copy(file, target / file.name)


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    with source.open("rb") as content, target.open("wb") as copy:
        shutil.copyfileobj(content, copy, PIECE)


def _sweep(parent: pathlib.Path) -> None:
    """Removes what killed processes have left unfinished."""
    left: Iterable[pathlib.Path] = parent.glob("*.tmp")
    for folder in left:
        if folder.is_dir() and time.time() - stamp(folder)[1] / 1e9 > ABANDONED:
            shutil.rmtree(folder, ignore_errors=True)
