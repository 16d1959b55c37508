"""Structured activation pruning in plain JAX."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.norm import rms_norm
from pallas_kernels.topk import at_least_kth


class Pruned(NamedTuple):
    """A normed row without its small channels, and which are left.

    The first `num_kept` of `channels_D` are the kept ones, ascending; after them come the others, ascending.
    """

    x_D: jax.Array
    channels_D: jax.Array  # int32
    num_kept: jax.Array  # int32


def channels_to_keep(keep_fraction: jax.Array, D: int) -> jax.Array:
    """Returns `clamp(ceil(keep_fraction * D), 1, D)` [...], int32: how many channels are kept at least."""
    return jnp.clip(jnp.ceil(jnp.float32(keep_fraction) * jnp.float32(D)).astype(jnp.int32), 1, D)


def keep_channels(x_D: jax.Array, count: jax.Array) -> jax.Array:
    """Returns x [..., D] with all but its `count` [...] largest |channels| set to zero.

    Channels that tie with the smallest of those are kept too; NaN counts as largest.
    """
    return jnp.where(at_least_kth(jnp.abs(x_D), count), x_D, 0.0)


def norm_prune(x_D: jax.Array, count: jax.Array, gain_D: jax.Array, eps: float) -> Pruned:
    """Returns the RMSNorm of one row without its small channels, and the list of those that are kept."""
    normed_D = rms_norm(x_D, gain_D, eps)
    kept_D = at_least_kth(jnp.abs(normed_D), count)
    channels_D = jnp.argsort(~kept_D, stable=True).astype(jnp.int32)
    return Pruned(jnp.where(kept_D, normed_D, 0.0), channels_D, jnp.sum(kept_D, dtype=jnp.int32))
