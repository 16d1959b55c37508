"""Pallas' words for kernels that are lowered through Triton, and what to say where JAX no longer has them.

JAX 0.12 says at every lowering that this backend will be removed.  Where it has been, what asks for these
kernels by name is refused, and auto takes XLA.
"""

import importlib
from typing import Any

import jax

from pallas_kernels.errors import UnavailableError

WORDS = ("CompilerParams", "load", "store", "elementwise_inline_asm")  # what the kernels use of it


def problem() -> str | None:
    """Says why kernels cannot be lowered through Triton by Pallas, or None."""
    if not isinstance(plgpu, _Gone):
        return None
    return f"jax {jax.__version__} has no Pallas through Triton any more (jax 0.12 has)"


class _Gone:
    """In place of the module: a kernel of jax-triton's that needs one of these beside it says so, too."""

    def __getattr__(self, word: str) -> Any:
        raise UnavailableError("a GPU's kernel", "pallas", f"use {word}", str(problem()), "'xla'")


def find() -> Any:
    """Returns JAX's module, or what refuses to be used."""
    try:
        module = importlib.import_module("jax.experimental.pallas.triton")
    except ImportError:
        return _Gone()
    return module if all(hasattr(module, word) for word in WORDS) else _Gone()


plgpu = find()
