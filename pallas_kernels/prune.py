"""Structured activation pruning: keep the largest channels of a row."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
    op, D = "keep_channels", x_D.shape[-1]
    if choose(op, implementation, hidden=D, dtype=x_D.dtype.name) == "xla":
        kept = _keep_channels
    else:
        kernels = prune_tpu if current_platform() == "tpu" else prune_gpu

        def rows(x_NxD: jax.Array, count_N: jax.Array) -> jax.Array:
            return kernels.keep_channels(x_NxD, count_N, interpret())

        kept = jnp.vectorize(one_row(rows), signature="(d),()->(d)")
    return no_gradient(op, kept)(x_D, _budget(keep_fraction, D))


def norm_prune(
    x_D: jax.Array, gain_D: jax.Array, eps: float, keep_fraction: jax.Array, implementation: str | None = None
) -> Pruned:
    """RMSNorm of a row (float32), then `keep_channels`, with the kept channels as a list."""
    op, D = "norm_prune", x_D.shape[-1]
    if choose(op, implementation, hidden=D, dtype=x_D.dtype.name) == "xla":
        pruned: Callable[..., Any] = functools.partial(_norm_prune, eps=eps)
    else:
        kernels = prune_tpu if current_platform() == "tpu" else prune_gpu

        def rows(x_NxD: jax.Array, count_N: jax.Array, gain_D: jax.Array) -> tuple[jax.Array, ...]:
            return kernels.norm_prune(x_NxD, count_N, gain_D, eps, interpret())

        pruned = one_row(rows, num_shared=1)
    return Pruned(*no_gradient(op, pruned)(x_D, _budget(keep_fraction, D), gain_D))


def _budget(keep_fraction: jax.Array, D: int) -> jax.Array:
    """Channels to keep at least, int32."""
    return jnp.clip(jnp.ceil(jnp.float32(keep_fraction) * jnp.float32(D)).astype(jnp.int32), 1, D)


def _keep_channels(x_D: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.where(at_least_kth(jnp.abs(x_D), count), x_D, 0.0)


def _norm_prune(x_D: jax.Array, count: jax.Array, gain_D: jax.Array, *, eps: float) -> Pruned:
    normed_D = rms_norm(x_D, gain_D, eps)
    kept_D = at_least_kth(jnp.abs(normed_D), count)
    channels_D = jnp.argsort(~kept_D, stable=True).astype(jnp.int32)
    return Pruned(jnp.where(kept_D, normed_D, 0.0), channels_D, jnp.sum(kept_D, dtype=jnp.int32))
