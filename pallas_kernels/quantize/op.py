"""Quantisation's operations, which pick an implementation: `reference` in XLA, or a kernel (`gpu`, `tpu`)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.dispatch import choose, current_platform, interpret, no_gradient
from pallas_kernels.one_row import one_row
from pallas_kernels.quantize import gpu, reference, tpu
from pallas_kernels.quantize.reference import MAX_BITS, largest_multiple


def fake_quantize(y_D: jax.Array, bits: jax.Array, implementation: str | None = None) -> jax.Array:
    """Returns y [..., D] rounded (half to even) to `bits` bits with one scale per row.

    `bits` [...] are whole numbers of at least 2.  The arithmetic is float32 whatever y's dtype, as in the
    authors' code; the result has y's dtype.
    """
    op = "fake_quantize"
    facts: dict[str, Any] = {"hidden": y_D.shape[-1], "dtype": y_D.dtype.name}
    if choose(op, implementation, asks_again=True, **facts) == "xla":
        return no_gradient(op, reference.fake_quantize)(y_D, jnp.asarray(bits))
    kernels = tpu if current_platform() == "tpu" else gpu

    def rows(y_NxD: jax.Array, bits_N: jax.Array) -> jax.Array:
        name = choose(op, implementation, rows=len(y_NxD), **facts)
        if name == "xla":
            return reference.fake_quantize(y_NxD, bits_N)
        top_N = top_or_zero(bits_N)
        if name == "native":
            return native.call("quantize", [native.floats(*y_NxD.shape)], y_NxD, top_N)[0]
        return kernels.fake_quantize(y_NxD, top_N, interpret())

    rounded = jnp.vectorize(one_row(rows), signature="(d),()->(d)")
    return no_gradient(op, rounded)(y_D, jnp.asarray(bits))


def quantize_residual(
    y_D: jax.Array,
    bits: jax.Array,
    residual_D: jax.Array,
    gain_D: jax.Array,
    eps: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns one row's `residual + fake_quantize(y)`, and the RMSNorm of that with the next norm's gain."""
    op = "quantize_residual"
    facts: dict[str, Any] = {"hidden": y_D.shape[-1], "dtype": y_D.dtype.name}
    if choose(op, implementation, asks_again=True, **facts) == "xla":
        plain = functools.partial(reference.quantize_residual, eps=eps)
        return no_gradient(op, plain)(y_D, jnp.asarray(bits), residual_D, gain_D)
    kernels = tpu if current_platform() == "tpu" else gpu

    def rows(y_NxD: jax.Array, bits_N: jax.Array, residual_NxD: jax.Array, gain_D: jax.Array) -> tuple:
        name = choose(op, implementation, rows=len(y_NxD), **facts)
        if name == "xla":
            return reference.quantize_residual(y_NxD, bits_N, residual_NxD, gain_D, eps)
        top_N = top_or_zero(bits_N)
        if name == "native":
            out, args = [native.floats(*y_NxD.shape)] * 2, (y_NxD, top_N, residual_NxD, gain_D)
            return tuple(native.call("quantize_residual", out, *args, eps=np.float32(eps)))
        return kernels.quantize_residual(y_NxD, top_N, residual_NxD, gain_D, eps, interpret())

    fused = no_gradient(op, one_row(rows, num_shared=1))
    return fused(y_D, jnp.asarray(bits), residual_D, gain_D)


def top_or_zero(bits: jax.Array) -> jax.Array:
    """Returns what the kernels take for `bits`: `largest_multiple`, and 0 for rows that pass unchanged."""
    bits = jnp.asarray(bits)
    return jnp.where(bits >= MAX_BITS, 0.0, largest_multiple(bits))
