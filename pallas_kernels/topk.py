"""Exact selection of a row's largest entries, without sorting.

SOL keeps what is **at least** the k-th largest everywhere, so ties keep more than k (`docs/method.md`, "The
three axes").
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

_LOWEST, _HIGHEST = -(1 << 31), (1 << 31) - 1
_INFINITY_BITS = 0x7F800000
_LANES = 32


def ordered_bits(x: jax.Array) -> jax.Array:
    """Returns float32 as int32 in the same order (both zeros alike; every NaN alike and above infinity).

    A NaN's sign does not count: x86 makes those of arithmetic negative, which must not hide them below all
    numbers.
    """
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x).astype(jnp.float32), jnp.int32)
    return jnp.where(is_nan(x), _HIGHEST, bits ^ ((bits >> 31) & _HIGHEST))


def is_nan(x: jax.Array) -> jax.Array:
    """Says which of x are NaN, by their bits: in Mosaic a NaN is not different from itself."""
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & _HIGHEST > _INFINITY_BITS


def kth_largest(bits: Sequence[jax.Array], k: jax.Array, axis: int | tuple[int, int] = -1) -> jax.Array:
    """Returns the k-th largest [..., 1] of `ordered_bits` [..., N] in one or more parts.

    k [..., 1] counts from 1.

    With two axes it does so of [..., M, N], which are one row in two dimensions: [..., 1, 1].

    It bisects the 32 bits of the threshold, in 32 counting passes over a row that stays in cache (or
    registers).  A sort costs 10 to 20 times as much on a CPU and does not exist in the kernels' languages.
    """

    def set_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold ^ (jnp.int32(1) << (31 - i))  # the first step decides the sign
        counts = (jnp.sum((bits_N >= higher).astype(jnp.int32), axis, keepdims=True) for bits_N in bits)
        return jnp.where(sum(counts) >= k, higher, threshold)

    return lax.fori_loop(0, 32, set_bit, jnp.full(k.shape, _LOWEST, jnp.int32))


def at_least_kth(x_N: jax.Array, k: jax.Array) -> jax.Array:
    """Returns a mask [..., N] of entries >= the k-th largest of the last axis, for k [...] from 1 to N."""
    *rows, N = x_N.shape
    # XLA's CPU code counts rows of lanes faster than one long row: 1.5 times at N = 1,024, twice at 576.
    # Rows that would have to be padded (131 pages) gain nothing.
    lanes = _LANES if N % _LANES == 0 else N
    bits_MxN = ordered_bits(x_N).reshape(*rows, N // lanes, lanes)
    threshold = kth_largest([bits_MxN], jnp.broadcast_to(k, rows)[..., None, None], (-2, -1))
    return (bits_MxN >= threshold).reshape(x_N.shape)
