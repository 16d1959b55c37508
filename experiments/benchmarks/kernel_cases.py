"""What a measured operation is: inputs, implementations, what each reads, and the answer in float64."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import current_platform, triton_problem

LAST_LEVEL_CACHE = 60e6  # bytes; the H200's


class KernelWork(NamedTuple):
    """What an implementation reads and writes, in bytes, and computes."""

    bytes: float
    flops: float


def as_they_are(x: Any, buffer: Any) -> tuple[Any, Any]:
    return x, buffer


@dataclasses.dataclass(frozen=True)
class Variant:
    """One implementation: `call(input, buffer)`, and its work given the share that the action keeps.

    `adapt` turns inputs and buffers into what it takes, outside of what is timed.
    """

    call: Callable[..., Any]
    work: Callable[[float], KernelWork]
    dense: bool = False  # answers without the action
    peer: bool = False  # counts among the best dense peers
    adapt: Callable[[Any, Any], tuple[Any, Any]] = as_they_are
    first: Callable[[Any], Any] = lambda out: out[0]  # the first sequence of its output
    compile: Callable[..., Any] | None = None  # None: timing.compile_chains


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """An operation at a shape.  Its actions are data of one compiled program, as in training."""

    op: str
    shape: str
    dtype: Any  # of the operands, for the error that is allowed
    actions: Mapping[str, Sequence[Any]]  # inputs of each call
    buffers: Sequence[Any]
    variants: Mapping[str, Variant]
    kept: Callable[[Any, Any], float]  # realised share, of an input and a buffer
    exact: Callable[[Any, Any, bool], np.ndarray]  # answer of the first sequence, sparse or dense


def implementations() -> tuple[str, ...]:
    """Of the operations here."""
    return ("xla", "pallas", "triton") if _has_triton() else ("xla", "pallas")


def _has_triton() -> bool:
    return current_platform() == "gpu" and triton_problem() is None


def normals(key: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    draw = jax.jit(lambda key: jax.random.normal(key, shape, jnp.float32).astype(dtype))
    return draw(jax.random.key(key))


def calls_of(bytes: float, smoke: bool) -> tuple[int, int]:
    """Calls of a long chain, and buffers that take turns in it."""
    if smoke:
        return 2, 2
    calls = 2 * int(np.clip(math.ceil(5e-4 / (bytes / 3e12 + 5e-6)), 2, 16))
    return calls, int(np.clip(math.ceil(4 * LAST_LEVEL_CACHE / bytes), 2, calls))
