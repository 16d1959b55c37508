"""Symmetric quantisation of a row to a number of bits, and back."""

import jax
import jax.numpy as jnp

from pallas_kernels import quantize_gpu, quantize_tpu
from pallas_kernels.dispatch import choose, current_platform, interpret, no_gradient
from pallas_kernels.norm import rms_norm
from pallas_kernels.one_row import one_row

MAX_BITS = 16  # from here on a row passes unchanged


def fake_quantize(y_D: jax.Array, bits: jax.Array, implementation: str | None = None) -> jax.Array:
    """y rounded (half to even) to `bits` bits with one scale per row; y [..., D], whole bits >= 2 [...].

    The arithmetic is float32 whatever y's dtype, as in the authors' code; the result has y's dtype.
    """
    op = "fake_quantize"
    if choose(op, implementation, hidden=y_D.shape[-1], dtype=y_D.dtype.name) == "xla":
        return no_gradient(op, _fake_quantize)(y_D, jnp.asarray(bits))
    kernels = quantize_tpu if current_platform() == "tpu" else quantize_gpu

    def rows(y_NxD: jax.Array, top_N: jax.Array) -> jax.Array:
        return kernels.fake_quantize(y_NxD, top_N, interpret())

    rounded = jnp.vectorize(one_row(rows), signature="(d),()->(d)")
    return no_gradient(op, rounded)(y_D, _top_or_zero(bits))


def _fake_quantize(y_D: jax.Array, bits: jax.Array) -> jax.Array:
    bits = bits[..., None]
    top = _top(bits)
    wide_D = y_D.astype(jnp.float32)
    scale = _divide(jnp.maximum(jnp.max(jnp.abs(wide_D), -1, keepdims=True), 1e-8), top)
    rounded_D = jnp.clip(jnp.round(_divide(wide_D, scale)), -top, top) * scale
    return jnp.where(bits >= MAX_BITS, y_D, rounded_D.astype(y_D.dtype))


def quantize_residual(
    y_D: jax.Array,
    bits: jax.Array,
    residual_D: jax.Array,
    gain_D: jax.Array,
    eps: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One row's `residual + fake_quantize(y)`, and the RMSNorm of that with the next norm's gain."""
    op = "quantize_residual"

    def by_xla(y_D: jax.Array, bits: jax.Array, residual_D: jax.Array, gain_D: jax.Array) -> tuple:
        stream_D = residual_D + _fake_quantize(y_D, bits)
        return stream_D, rms_norm(stream_D, gain_D, eps)

    if choose(op, implementation, hidden=y_D.shape[-1], dtype=y_D.dtype.name) == "xla":
        return no_gradient(op, by_xla)(y_D, jnp.asarray(bits), residual_D, gain_D)
    kernels = quantize_tpu if current_platform() == "tpu" else quantize_gpu

    def rows(y_NxD: jax.Array, top_N: jax.Array, residual_NxD: jax.Array, gain_D: jax.Array) -> tuple:
        return kernels.quantize_residual(y_NxD, top_N, residual_NxD, gain_D, eps, interpret())

    fused = no_gradient(op, one_row(rows, num_shared=1))
    return fused(y_D, _top_or_zero(bits), residual_D, gain_D)


def _top(bits: jax.Array) -> jax.Array:
    """The largest multiple of the scale, float32."""
    steps = (1 << (jnp.minimum(bits, MAX_BITS).astype(jnp.int32) - 1)) - 1  # `exp2` is off by 1e-7
    return steps.astype(jnp.float32)


def _top_or_zero(bits: jax.Array) -> jax.Array:
    """What the kernels take: `_top`, and 0 for rows that pass unchanged."""
    bits = jnp.asarray(bits)
    return jnp.where(bits >= MAX_BITS, 0.0, _top(bits))


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, rounded as IEEE 754 asks: a value on the edge of a step must not depend on the compiler.

    XLA turns a division by a broadcast or constant into a product with its reciprocal, and a / (b / c)
    into a * c / b.  It does not see through the selection (false for NaN alone).
    """
    return a / jnp.where(a == a, b, a)
