"""TPU kernels of quantisation (Pallas, lowered through Mosaic).

The chip's division is not IEEE 754's, here as in XLA: a value on the very edge of a step may round to the
other side.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.rows_tpu import call_rows
from pallas_kernels.topk import is_nan


def fake_quantize(y_NxD: jax.Array, top_N: jax.Array, interpret: Any = False) -> jax.Array:
    """Rounds each row to whole multiples, up to `top`, of its own scale; a row whose `top` is 0 stays."""
    out = jax.ShapeDtypeStruct(y_NxD.shape, y_NxD.dtype)
    return call_rows(_quantize_kernel, out, y_NxD, top_N[:, None], name="fake_quantize", interpret=interpret)


def quantize_residual(
    y_NxD: jax.Array,
    top_N: jax.Array,
    residual_NxD: jax.Array,
    gain_D: jax.Array,
    eps: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns `residual + fake_quantize(y)` and the RMSNorm of that: two [N, D] of the residual's dtype."""
    out = (jax.ShapeDtypeStruct(y_NxD.shape, residual_NxD.dtype),) * 2
    kernel = functools.partial(_residual_kernel, eps=eps)
    args = y_NxD, top_N[:, None], residual_NxD, gain_D[None]
    return call_rows(kernel, out, *args, name="quantize_residual", interpret=interpret)


def _quantize_kernel(y_ref: Any, top_ref: Any, out_ref: Any) -> None:
    out_ref[...] = _rounded(y_ref[...], top_ref[...])


def _residual_kernel(
    y_ref: Any,
    top_ref: Any,
    residual_ref: Any,
    gain_ref: Any,
    stream_ref: Any,
    normed_ref: Any,
    *,
    eps: float,
) -> None:
    stream = residual_ref[...] + _rounded(y_ref[...], top_ref[...])
    stream_ref[...] = stream
    mean = jnp.sum(stream * stream, 1, keepdims=True) / stream.shape[1]
    normed = stream * lax.rsqrt(mean + eps) * gain_ref[...].astype(jnp.float32)
    normed_ref[...] = normed.astype(normed_ref.dtype)


def _rounded(y: jax.Array, top: jax.Array) -> jax.Array:
    wide = y.astype(jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(wide), 1, keepdims=True), 1e-8)
    # A row with a NaN is NaN, whatever the chip's maximum does with one.
    spoilt = jnp.sum(is_nan(wide).astype(jnp.float32), 1, keepdims=True) > 0
    scale = _divide(jnp.where(spoilt, jnp.nan, largest), top)
    steps = lax.round(_divide(wide, scale), lax.RoundingMethod.TO_NEAREST_EVEN)
    steps = jnp.where(steps > top, top, jnp.where(steps < -top, -top, steps))
    return jnp.where(top == 0, y, (steps * scale).astype(y.dtype))


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a / b; when interpreted, the selection keeps XLA from rewriting it (`reference._divide`)."""
    return a / jnp.where(a == a, b, a)
