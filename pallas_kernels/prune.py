"""Structured activation pruning: keep the largest channels of a row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import prune_gpu, prune_tpu
from pallas_kernels.dispatch import choose, current_platform, interpret, no_gradient
from pallas_kernels.norm import rms_norm
from pallas_kernels.one_row import one_row
from pallas_kernels.topk import at_least_kth


class Pruned(NamedTuple):
    """A normed row without its small channels, and which are left.

    The first `num_kept` of `channels_D` are the kept ones, ascending; after them come the others, ascending.
    """

    x_D: jax.Array
    channels_D: jax.Array  # int32
    num_kept: jax.Array  # int32


def keep_channels(x_D: jax.Array, keep_fraction: jax.Array, implementation: str | None = None) -> jax.Array:
    """x with all but its `clamp(ceil(keep_fraction * D), 1, D)` largest |channels| set to zero.

    Channels that tie with the smallest of those are kept too; NaN counts as largest.  Batched rows share
    shapes, never counts: x [..., D], keep_fraction [...].
    """
    if choose("keep_channels", implementation, hidden=x_D.shape[-1]) == "xla":
        return jnp.where(_largest(x_D, keep_fraction), x_D, 0.0)
    kernels = prune_tpu if current_platform() == "tpu" else prune_gpu

    def rows(x_NxD: jax.Array, count_N: jax.Array) -> jax.Array:
        return kernels.keep_channels(x_NxD, count_N, interpret())

    kept = jnp.vectorize(one_row(rows), signature="(d),()->(d)")
    return no_gradient("keep_channels", kept)(x_D, _budget(keep_fraction, x_D.shape[-1]))


def norm_prune(
    x_D: jax.Array, gain_D: jax.Array, eps: float, keep_fraction: jax.Array, implementation: str | None = None
) -> Pruned:
    """RMSNorm of a row (float32), then `keep_channels`, with the kept channels as a list."""
    if choose("norm_prune", implementation, hidden=x_D.shape[-1]) == "xla":
        normed_D = rms_norm(x_D, gain_D, eps)
        kept_D = _largest(normed_D, keep_fraction)
        channels_D = jnp.argsort(~kept_D, stable=True).astype(jnp.int32)
        return Pruned(jnp.where(kept_D, normed_D, 0.0), channels_D, jnp.sum(kept_D, dtype=jnp.int32))
    kernels = prune_tpu if current_platform() == "tpu" else prune_gpu

    def rows(x_NxD: jax.Array, count_N: jax.Array, gain_D: jax.Array) -> tuple[jax.Array, ...]:
        return kernels.norm_prune(x_NxD, count_N, gain_D, eps, interpret())

    pruned = no_gradient("norm_prune", one_row(rows, num_shared=1))
    return Pruned(*pruned(x_D, _budget(keep_fraction, x_D.shape[-1]), gain_D))


def _budget(keep_fraction: jax.Array, D: int) -> jax.Array:
    """Channels to keep at least, int32."""
    return jnp.clip(jnp.ceil(jnp.float32(keep_fraction) * jnp.float32(D)).astype(jnp.int32), 1, D)


def _largest(x_D: jax.Array, keep_fraction: jax.Array) -> jax.Array:
    return at_least_kth(jnp.abs(x_D), _budget(keep_fraction, x_D.shape[-1]))
