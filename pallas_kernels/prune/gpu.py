"""GPU kernels of pruning (Pallas, lowered through Triton)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.pallas_triton import plgpu
from pallas_kernels.rows_gpu import call_rows, lanes
from pallas_kernels.topk import ordered_bits


def keep_channels(x_NxD: jax.Array, count_N: jax.Array, interpret: bool = False) -> jax.Array:
    """Returns each row with all but its `count` largest |channels|, and what ties with them, set to zero."""
    out = jax.ShapeDtypeStruct(x_NxD.shape, x_NxD.dtype)
    return call_rows(_keep_kernel, out, x_NxD, count_N, name="keep_channels", interpret=interpret)


def norm_prune(
    x_NxD: jax.Array, count_N: jax.Array, gain_D: jax.Array, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the fields of `Pruned` for each row: [N, D], [N, D], [N]."""
    N, D = x_NxD.shape
    out = tuple(
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((N, D), jnp.float32), ((N, D), jnp.int32), ((N,), jnp.int32))
    )
    kernel = functools.partial(_norm_kernel, eps=eps)
    return call_rows(kernel, out, x_NxD, count_N, gain_D, name="norm_prune", interpret=interpret)


def compact(x_NxD: jax.Array, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns the channels where some row is not zero, ascending, then the others: [1, D].

    The second result [1] counts the former.
    """
    D = x_NxD.shape[1]
    out = jax.ShapeDtypeStruct((1, D), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return call_rows(_compact_kernel, out, x_NxD, name="compact", interpret=interpret, programs=1)


def _keep_kernel(x_ref: Any, count_ref: Any, out_ref: Any) -> None:
    row, D = pl.program_id(0), x_ref.shape[1]
    lane, inside = lanes(D)
    x = plgpu.load(x_ref.at[row, lane], mask=inside, other=0)
    kept = _largest(x, inside, count_ref[row])
    plgpu.store(out_ref.at[row, lane], jnp.where(kept, x, 0), mask=inside)


def _norm_kernel(
    x_ref: Any, count_ref: Any, gain_ref: Any, out_ref: Any, channels_ref: Any, kept_ref: Any, *, eps: float
) -> None:
    row, D = pl.program_id(0), x_ref.shape[1]
    lane, inside = lanes(D)
    x = plgpu.load(x_ref.at[row, lane], mask=inside, other=0).astype(jnp.float32)
    gain = plgpu.load(gain_ref.at[lane], mask=inside, other=0).astype(jnp.float32)
    normed = x * lax.rsqrt(jnp.sum(x * x) / D + eps) * gain
    kept = _largest(normed, inside, count_ref[row])
    plgpu.store(out_ref.at[row, lane], jnp.where(kept, normed, 0), mask=inside)
    _store_channels(kept, row, channels_ref, kept_ref)


def _compact_kernel(x_ref: Any, channels_ref: Any, kept_ref: Any) -> None:
    N, D = x_ref.shape
    lane, inside = lanes(D)
    kept = jnp.zeros(lane.shape, jnp.bool_)
    for row in range(N):
        kept |= plgpu.load(x_ref.at[row, lane], mask=inside, other=0) != 0
    _store_channels(kept, 0, channels_ref, kept_ref)


def _largest(x: jax.Array, inside: jax.Array, count: jax.Array) -> jax.Array:
    """Returns a mask of the lanes whose |x| is at least the count-th largest (`topk.at_least_kth`)."""
    bits = jnp.where(inside, ordered_bits(jnp.abs(x.astype(jnp.float32))), -1)  # the padding below every |x|

    def unsettled(state: tuple[Any, Any, Any]) -> jax.Array:
        i, _, at_least = state
        return (i < 31) & (at_least != count)

    def set_bit(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        i, threshold, at_least = state
        higher = threshold | (jnp.int32(1) << (30 - i))
        above = jnp.sum((bits >= higher).astype(jnp.int32))
        enough = above >= count
        return i + 1, jnp.where(enough, higher, threshold), jnp.where(enough, above, at_least)

    # Once exactly `count` lanes reach the threshold, its lower bits decide nothing.  In rows without ties
    # that is two thirds of the way.
    _, threshold, _ = lax.while_loop(unsettled, set_bit, (jnp.int32(0), jnp.int32(0), jnp.int32(bits.size)))
    return bits >= threshold


def _store_channels(kept: jax.Array, row: Any, channels_ref: Any, kept_ref: Any) -> None:
    """Writes which lanes are kept, ascending, then which are not, and how many are."""
    lane, inside = lanes(channels_ref.shape[1])
    up_to = jnp.cumsum(kept.astype(jnp.int32))
    count = jnp.sum(kept.astype(jnp.int32))
    # A permutation of all lanes; the padding, which is never kept, stays at the end and is not written.
    place = jnp.where(kept, up_to - 1, count + lane - up_to)
    plgpu.store(channels_ref.at[row, place], lane, mask=inside)
    kept_ref[row] = count
