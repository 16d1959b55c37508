"""Short hexadecimal names for things that are known by what they hold."""

import hashlib
import json
from typing import Any

import jax
import numpy as np


def digest(what: Any) -> str:
    """Short hex name of anything JSON can hold."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def array_digest(tree: Any) -> str:
    """Short hex name of a tree of arrays."""
    state = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(leaf)
        state.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return state.hexdigest()[:16]
