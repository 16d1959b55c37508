"""A model on an object store: copied to this machine once, for its files are mapped into memory."""

import pathlib

from sol_jax.copies import fetch
from sol_jax.digests import cache_folder, digest
from sol_jax.errors import UserError
from sol_jax.files import as_os_errors, stamp

SUFFIXES = (".json", ".safetensors", ".jinja")  # of a folder, what is read
ENDING = 1 << 16  # bytes at the end of a file, of its last tensor


def local_copy(path: pathlib.Path) -> pathlib.Path:
    """The copy, in the cache folder, of a model folder or .gguf file on an object store.

    It is known by names, sizes, times of change (which not every store tells) and the ends of its files, so
    that a model that was replaced is copied anew.  Raises `UserError` if it cannot be read, or the disk has
    no room.
    """
    try:
        with as_os_errors():
            whole = path.is_dir()
            found = [file for file in path.iterdir() if file.suffix in SUFFIXES] if whole else [path]
            files = sorted(file for file in found if file.is_file())
            listing = [[file.name, *stamp(file), _ending(file)] for file in files]
    except OSError as error:
        raise UserError(f"model.path: {path} cannot be read ({error})") from error
    folder = cache_folder() / "models" / digest([str(path), listing])
    if whole:
        return fetch(files, folder / path.name, "model.path")
    return fetch(files, folder / path.stem, "model.path") / path.name


def _ending(file: pathlib.Path) -> str:
    size = stamp(file)[0]
    with file.open("rb") as content:
        content.seek(max(size - ENDING, 0))
        return digest(content.read().hex())
