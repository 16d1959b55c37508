"""Hexadecimal names for things that are known by what they hold.

Hashing a file of some GB takes seconds, so its digest is remembered with its size and times of change, in
`digests.json` of the cache folder; a file that looks as it did is not read again.  The time that the system
keeps (ctime) is one of them: tools that unpack or copy files set the other one as they like.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from sol_jax.errors import UserError
from sol_jax.files import local_path, parse_json, write_whole

CACHE_DIR = "~/.cache/sol_jax"


def digest(what: Any) -> str:
    """Short hex name of anything JSON can hold."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def array_digest(tree: Any) -> str:
    """Short hex name of a tree of arrays."""
    import jax  # here, for text is prepared without it

    state = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(leaf)
        state.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return state.hexdigest()[:16]


def file_digest(file: pathlib.Path) -> str:
    """sha256 of a file, remembered until its size, a time of change or its place on the disk differs."""
    file = file.resolve()
    stamp = file.stat()
    known, key = _remembered(), str(file)
    seen = [stamp.st_size, stamp.st_mtime_ns, stamp.st_ctime_ns, stamp.st_ino]
    found = known.get(key)
    if isinstance(found, list) and found[:-1] == seen:
        return str(found[-1])
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    _remember(known | {key: [*seen, digest]})
    return digest


def cache_folder() -> pathlib.Path:
    """Where copies and digests are kept on this machine."""
    return local_path(CACHE_DIR, "the cache folder")


def _memory() -> pathlib.Path:
    return cache_folder() / "digests.json"


def _remembered() -> dict[str, list]:
    try:
        known = parse_json(_memory().read_text())
    except (OSError, ValueError):  # a `UserError`, where there is no home folder, is one
        return {}
    return known if isinstance(known, dict) else {}


def _remember(known: Mapping[str, list]) -> None:
    """Best effort: without it files are hashed again."""
    with contextlib.suppress(OSError, UserError):
        write_whole(_memory(), json.dumps(known), writer=f".{os.getpid()}")
