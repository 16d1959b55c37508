"""Exact selection of a row's largest entries, without sorting.

The rule everywhere in SOL: keep what is **at least** the k-th largest, so ties keep more than k.
"""

import jax
import jax.numpy as jnp
from jax import lax


def ordered_bits(x: jax.Array) -> jax.Array:
    """float32 -> uint32 whose unsigned order is the floats' order (both zeros alike; NaN above infinity)."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x).astype(jnp.float32), jnp.int32)
    magnitude_order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return lax.bitcast_convert_type(magnitude_order, jnp.uint32) ^ jnp.uint32(1 << 31)


def at_least_kth(x_N: jax.Array, k: jax.Array) -> jax.Array:
    """Mask [..., N] of the entries >= the k-th largest of the last axis, for k in 1..N (k: [...]).

    Bisects the 32 bits of the threshold: 32 counting passes over a row that stays in cache, where a
    sort costs 10 to 20 times as much on a CPU and does not exist in the GPU kernels' language.
    """
    bits_N = ordered_bits(x_N)

    def set_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        enough = jnp.sum(bits_N >= higher[..., None], -1, dtype=jnp.int32) >= k
        return jnp.where(enough, higher, threshold)

    threshold = lax.fori_loop(0, 32, set_bit, jnp.zeros(x_N.shape[:-1], jnp.uint32))
    return bits_N >= threshold[..., None]
