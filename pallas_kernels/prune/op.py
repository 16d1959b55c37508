"""Pruning's operations, which pick an implementation: `reference` in XLA, or a kernel (`gpu`, `tpu`)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.dispatch import choose, current_platform, interpret, no_gradient
from pallas_kernels.one_row import one_row
from pallas_kernels.prune import gpu, reference, tpu
from pallas_kernels.prune.reference import Pruned, channels_to_keep


def keep_channels(x_D: jax.Array, keep_fraction: jax.Array, implementation: str | None = None) -> jax.Array:
    """Returns x with all but its `clamp(ceil(keep_fraction * D), 1, D)` largest |channels| set to zero.

    Channels that tie with the smallest of those are kept too; NaN counts as largest.  Batched rows share
    shapes, never counts: x [..., D], keep_fraction [...].
    """
    op, D = "keep_channels", x_D.shape[-1]
    facts: dict[str, Any] = {"hidden": D, "dtype": x_D.dtype.name}
    if choose(op, implementation, asks_again=True, **facts) == "xla":
        kept = reference.keep_channels
    else:
        kernels = tpu if current_platform() == "tpu" else gpu

        def rows(x_NxD: jax.Array, count_N: jax.Array) -> jax.Array:
            name = choose(op, implementation, rows=len(x_NxD), **facts)
            if name == "xla":
                return reference.keep_channels(x_NxD, count_N)
            if name == "native":
                return native.call("keep_channels", [native.floats(*x_NxD.shape)], x_NxD, count_N)[0]
            return kernels.keep_channels(x_NxD, count_N, interpret())

        kept = jnp.vectorize(one_row(rows), signature="(d),()->(d)")
    return no_gradient(op, kept)(x_D, channels_to_keep(keep_fraction, D))


def norm_prune(
    x_D: jax.Array, gain_D: jax.Array, eps: float, keep_fraction: jax.Array, implementation: str | None = None
) -> Pruned:
    """Returns the RMSNorm of a row (float32) after `keep_channels`, with the kept channels as a list."""
    op, D = "norm_prune", x_D.shape[-1]
    facts: dict[str, Any] = {"hidden": D, "dtype": x_D.dtype.name}
    if choose(op, implementation, asks_again=True, **facts) == "xla":
        pruned: Callable[..., Any] = functools.partial(reference.norm_prune, eps=eps)
    else:
        kernels = tpu if current_platform() == "tpu" else gpu

        def rows(x_NxD: jax.Array, count_N: jax.Array, gain_D: jax.Array) -> tuple[jax.Array, ...]:
            N, name = len(x_NxD), choose(op, implementation, rows=len(x_NxD), **facts)
            if name == "xla":
                one = functools.partial(reference.norm_prune, gain_D=gain_D, eps=eps)
                return tuple(jax.vmap(one)(x_NxD, count_N))
            if name == "native":
                out = [native.floats(N, D), native.integers(N, D), native.integers(N)]
                return tuple(native.call("norm_prune", out, x_NxD, count_N, gain_D, eps=np.float32(eps)))
            return kernels.norm_prune(x_NxD, count_N, gain_D, eps, interpret())

        pruned = one_row(rows, num_shared=1)
    return Pruned(*no_gradient(op, pruned)(x_D, channels_to_keep(keep_fraction, D), gain_D))
