"""TPU kernels of pruning (Pallas, lowered through Mosaic).

A TPU walks a grid serially and has no scatter: rows are batched here, and lists are compacted by shifting
lanes a power of two at a time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.rows_tpu import call_rows
from pallas_kernels.topk import ordered_bits

LANES = 128
INDEX_BITS = 15  # a lane's index and its distance share 32 bits; rows are 16,384 at most (`tuning`)
INDEX = (1 << INDEX_BITS) - 1


def keep_channels(x_NxD: jax.Array, count_N: jax.Array, interpret: Any = False) -> jax.Array:
    """Returns each row with all but its `count` largest |channels|, and what ties with them, set to zero."""
    out = jax.ShapeDtypeStruct(x_NxD.shape, x_NxD.dtype)
    return call_rows(_keep_kernel, out, x_NxD, count_N[:, None], name="keep_channels", interpret=interpret)


def norm_prune(
    x_NxD: jax.Array, count_N: jax.Array, gain_D: jax.Array, eps: float, interpret: Any = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the fields of `Pruned` for each row: [N, D], [N, D], [N]."""
    N, D = x_NxD.shape
    width = pl.cdiv(D, LANES) * LANES  # lanes shift within whole registers
    pad = ((0, 0), (0, width - D))
    out = tuple(
        jax.ShapeDtypeStruct((N, size), dtype)
        for size, dtype in ((width, jnp.float32), (width, jnp.int32), (1, jnp.int32))
    )
    kernel = functools.partial(_norm_kernel, D=D, eps=eps)
    args = jnp.pad(x_NxD, pad), count_N[:, None], jnp.pad(gain_D[None], pad)
    pruned, channels, kept = call_rows(kernel, out, *args, name="norm_prune", interpret=interpret)
    return pruned[:, :D], channels[:, :D], kept[:, 0]


def _keep_kernel(x_ref: Any, count_ref: Any, out_ref: Any) -> None:
    x = x_ref[...]
    kept = _bits(x) >= _kth_largest(_bits(x), count_ref[...])
    out_ref[...] = jnp.where(kept, x, jnp.zeros_like(x))


def _norm_kernel(
    x_ref: Any,
    count_ref: Any,
    gain_ref: Any,
    out_ref: Any,
    channels_ref: Any,
    kept_ref: Any,
    *,
    D: int,
    eps: float,
) -> None:
    x = x_ref[...].astype(jnp.float32)
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    mean = jnp.sum(x * x, 1, keepdims=True) / D  # the padding is zero
    normed = x * lax.rsqrt(mean + eps) * gain_ref[...].astype(jnp.float32)
    bits = jnp.where(lane < D, _bits(normed), -1)  # the padding below every |x|
    kept = bits >= _kth_largest(bits, count_ref[...])
    out_ref[...] = jnp.where(kept, normed, 0.0)
    kept_ref[...] = _count(kept)
    channels_ref[...] = _channels(kept, lane)


def _bits(x: jax.Array) -> jax.Array:
    """Returns integers of at least 0 in the order of |x|."""
    return ordered_bits(jnp.abs(x.astype(jnp.float32)))


def _kth_largest(bits: jax.Array, count: jax.Array) -> jax.Array:
    """Returns the count-th largest of each row, by bisection of its 31 bits, with two axes throughout."""

    def set_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold | (jnp.int32(1) << (30 - i))
        return jnp.where(_count(bits >= higher) >= count, higher, threshold)

    return lax.fori_loop(0, 31, set_bit, jnp.zeros(count.shape, jnp.int32))


def _count(mask: jax.Array) -> jax.Array:
    """Returns how many lanes of each row are marked, [N, 1].

    They are summed as float32, which is exact to 2**24 and what the chip reduces natively.
    """
    return jnp.sum(mask.astype(jnp.float32), 1, keepdims=True).astype(jnp.int32)


def _channels(kept: jax.Array, lane: jax.Array) -> jax.Array:
    """Returns the lanes that are kept, ascending, and then the others."""
    width = lane.shape[1]
    before = kept.astype(jnp.int32)  # becomes: how many are kept up to each lane
    for shift in _powers(width):
        before += jnp.where(lane >= shift, pltpu.roll(before, shift, 1), 0)
    left = _pack(lane, lane + 1 - before, kept)
    right = _pack(lane, before[:, -1:] - before, ~kept)
    for shift in _powers(width):
        left, right = _shift(left, shift, width - shift), _shift(right, shift, shift)
    return (jnp.where(left > 0, left, right) & INDEX) - 1


def _powers(width: int) -> list[int]:
    return [1 << i for i in range((width - 1).bit_length())]


def _pack(lane: jax.Array, distance: jax.Array, live: jax.Array) -> jax.Array:
    """Packs how far a lane must go and its index plus one into 32 bits; lanes that are not `live` are 0."""
    return jnp.where(live, (distance << INDEX_BITS) | (lane + 1), 0)


def _shift(packed: jax.Array, shift: int, roll: int) -> jax.Array:
    """Moves the lanes whose distance has the bit `shift`.

    If the lowest bits come first, no two lanes ever meet.
    """
    moves = (packed >> INDEX_BITS) & shift != 0
    return jnp.where(moves, 0, packed) + pltpu.roll(jnp.where(moves, packed, 0), roll, 1)
