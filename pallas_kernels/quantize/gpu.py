"""GPU kernels of quantisation (Pallas, lowered through Triton)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.pallas_triton import plgpu
from pallas_kernels.rows_gpu import call_rows, lanes


def fake_quantize(y_NxD: jax.Array, top_N: jax.Array, interpret: bool = False) -> jax.Array:
    """Rounds each row to whole multiples, up to `top`, of its own scale; a row whose `top` is 0 stays."""
    out = jax.ShapeDtypeStruct(y_NxD.shape, y_NxD.dtype)
    kernel = functools.partial(_quantize_kernel, interpret=interpret)
    return call_rows(kernel, out, y_NxD, top_N, name="fake_quantize", interpret=interpret)


def quantize_residual(
    y_NxD: jax.Array,
    top_N: jax.Array,
    residual_NxD: jax.Array,
    gain_D: jax.Array,
    eps: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns `residual + fake_quantize(y)` and the RMSNorm of that: two [N, D] of the residual's dtype."""
    out = (jax.ShapeDtypeStruct(y_NxD.shape, residual_NxD.dtype),) * 2
    kernel = functools.partial(_residual_kernel, eps=eps, interpret=interpret)
    args = y_NxD, top_N, residual_NxD, gain_D
    return call_rows(kernel, out, *args, name="quantize_residual", interpret=interpret)


def _quantize_kernel(y_ref: Any, top_ref: Any, out_ref: Any, *, interpret: bool) -> None:
    row, (lane, inside) = pl.program_id(0), lanes(y_ref.shape[1])
    y = plgpu.load(y_ref.at[row, lane], mask=inside, other=0)
    plgpu.store(out_ref.at[row, lane], _rounded(y, top_ref[row], interpret), mask=inside)


def _residual_kernel(
    y_ref: Any,
    top_ref: Any,
    residual_ref: Any,
    gain_ref: Any,
    stream_ref: Any,
    normed_ref: Any,
    *,
    eps: float,
    interpret: bool,
) -> None:
    row, D = pl.program_id(0), y_ref.shape[1]
    lane, inside = lanes(D)
    y = plgpu.load(y_ref.at[row, lane], mask=inside, other=0)
    residual = plgpu.load(residual_ref.at[row, lane], mask=inside, other=0)
    gain = plgpu.load(gain_ref.at[lane], mask=inside, other=0).astype(jnp.float32)
    stream = residual + _rounded(y, top_ref[row], interpret)
    plgpu.store(stream_ref.at[row, lane], stream, mask=inside)
    normed = stream * lax.rsqrt(jnp.sum(stream * stream) / D + eps) * gain
    plgpu.store(normed_ref.at[row, lane], normed.astype(normed_ref.dtype), mask=inside)


def _rounded(y: jax.Array, top: jax.Array, interpret: bool) -> jax.Array:
    wide = y.astype(jnp.float32)
    # The largest is found by bits, which order like the numbers; the hardware's float maximum would drop a
    # NaN.
    bits = lax.bitcast_convert_type(jnp.abs(wide), jnp.int32)
    largest = lax.bitcast_convert_type(jnp.max(bits), jnp.float32)
    largest = jnp.where(largest < 1e-8, 1e-8, largest)
    scale = _divide(jnp.full(wide.shape, largest), jnp.full(wide.shape, top), interpret)
    steps = _half_to_even(_divide(wide, scale, interpret))
    steps = jnp.where(steps > top, top, jnp.where(steps < -top, -top, steps))
    return jnp.where(top == 0, y, (steps * scale).astype(y.dtype))


def _half_to_even(x: jax.Array) -> jax.Array:
    """Returns the nearest whole number; of XLA's roundings Triton has floor alone."""
    floor = jnp.floor(x)
    odd = floor - 2 * jnp.floor(floor * 0.5)
    past = x - floor  # exact
    return jnp.where((past > 0.5) | ((past == 0.5) & (odd == 1)), floor + 1, floor)


def _divide(a: jax.Array, b: jax.Array, interpret: bool) -> jax.Array:
    """Returns a / b rounded as IEEE 754 asks.

    CUDA compilers must be told so: their own division is off by up to 2 units.  When interpreted, the
    selection keeps XLA from rewriting the division (`reference._divide`).
    """
    if interpret:
        return a / jnp.where(a == a, b, a)
    (quotient,) = plgpu.elementwise_inline_asm(
        "div.rn.f32 $0, $1, $2;",
        args=[a, b],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, jnp.float32)],
    )
    return quotient
