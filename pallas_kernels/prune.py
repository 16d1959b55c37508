"""Structured activation pruning: keep the largest channels of a row."""

import jax
import jax.numpy as jnp

from pallas_kernels.topk import at_least_kth


def keep_channels(x_D: jax.Array, keep_fraction: jax.Array) -> jax.Array:
    """x with all but its `clamp(ceil(keep_fraction * D), 1, D)` largest |channels| set to zero.

    Batched rows share shapes, never counts: x [..., D], keep_fraction [...].
    """
    D = x_D.shape[-1]
    count = jnp.clip(jnp.ceil(jnp.float32(keep_fraction) * jnp.float32(D)).astype(jnp.int32), 1, D)
    return jnp.where(at_least_kth(jnp.abs(x_D), count), x_D, 0.0)
