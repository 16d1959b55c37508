"""Symmetric quantisation of a row to a number of bits, and back."""

import jax
import jax.numpy as jnp

MAX_BITS = 16  # from here on a row passes unchanged


def fake_quantize(y_D: jax.Array, bits: jax.Array) -> jax.Array:
    """y rounded (half to even) to `bits` bits with one scale per row; y [..., D], whole bits >= 2 [...].

    The arithmetic is float32 whatever y's dtype, as in the authors' code; the result has y's dtype.
    """
    bits = jnp.asarray(bits)[..., None]
    steps = (1 << (jnp.minimum(bits, MAX_BITS).astype(jnp.int32) - 1)) - 1  # `exp2` is off by 1e-7
    top = steps.astype(jnp.float32)
    wide_D = y_D.astype(jnp.float32)
    scale = _divide(jnp.maximum(jnp.max(jnp.abs(wide_D), -1, keepdims=True), 1e-8), top)
    rounded_D = jnp.clip(jnp.round(_divide(wide_D, scale)), -top, top) * scale
    return jnp.where(bits >= MAX_BITS, y_D, rounded_D.astype(y_D.dtype))


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, rounded as IEEE 754 asks: a value on the edge of a step must not depend on the compiler.

    XLA turns a division by a broadcast or constant into a product with its reciprocal, and a / (b / c)
    into a * c / b.  It does not see through the selection (false for NaN alone).
    """
    return a / jnp.where(a == a, b, a)
