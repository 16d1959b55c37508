"""Symmetric quantisation of a row to a number of bits, and back, in plain JAX."""

import jax
import jax.numpy as jnp

from pallas_kernels.norm import rms_norm

MAX_BITS = 16  # from here on a row passes unchanged


def fake_quantize(y_D: jax.Array, bits: jax.Array) -> jax.Array:
    """Returns y [..., D] rounded (half to even) to `bits` [...] whole bits with one scale per row.

    The arithmetic is float32 whatever y's dtype, as in the authors' code; the result has y's dtype.
    """
    bits = bits[..., None]
    top = largest_multiple(bits)
    wide_D = y_D.astype(jnp.float32)
    scale = _divide(jnp.maximum(jnp.max(jnp.abs(wide_D), -1, keepdims=True), 1e-8), top)
    rounded_D = jnp.clip(jnp.round(_divide(wide_D, scale)), -top, top) * scale
    return jnp.where(bits >= MAX_BITS, y_D, rounded_D.astype(y_D.dtype))


def quantize_residual(
    y_D: jax.Array, bits: jax.Array, residual_D: jax.Array, gain_D: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Returns one row's `residual + fake_quantize(y)` [D], and the RMSNorm [D] of that with the gain."""
    stream_D = residual_D + fake_quantize(y_D, bits)
    return stream_D, rms_norm(stream_D, gain_D, eps)


def largest_multiple(bits: jax.Array) -> jax.Array:
    """Returns the largest multiple of the scale that `bits` hold, float32."""
    steps = (1 << (jnp.minimum(bits, MAX_BITS).astype(jnp.int32) - 1)) - 1  # `exp2` is off by 1e-7
    return steps.astype(jnp.float32)


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a / b, rounded as IEEE 754 asks: a value on the edge of a step must not depend on the compiler.

    XLA turns a division by a broadcast or constant into a product with its reciprocal, and a / (b / c)
    into a * c / b.  It does not see through the selection (false for NaN alone).
    """
    return a / jnp.where(a == a, b, a)
