"""How parts of caches, and of weights of stacked layers, are read and written.

On a CPU bfloat16 is moved as bits: XLA's compiler widens slices and updates of it to float32 there, and with
them the whole array that they are cut from or written to.  On a TPU the bits would be that whole array once
more, for the reinterpretation is not free there.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels.dispatch import current_platform


def take_layer(stacked: jax.Array, layer: jax.Array) -> jax.Array:
    """Returns `stacked[layer]`."""
    return as_numbers(lax.dynamic_index_in_dim(as_bits(stacked), layer, 0, keepdims=False), stacked.dtype)


def cut(x_HxNxd: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns `x[:, start : start + size]`."""
    return as_numbers(lax.dynamic_slice_in_dim(as_bits(x_HxNxd), start, size, 1), x_HxNxd.dtype)


def put(x_HxNxd: jax.Array, new_HxMxd: jax.Array, start: jax.Array) -> jax.Array:
    """Returns x with `new` from `start` on; in place, where XLA may."""
    bits = lax.dynamic_update_slice_in_dim(as_bits(x_HxNxd), as_bits(new_HxMxd), start, 1)
    return as_numbers(bits, x_HxNxd.dtype)


def as_bits(x: jax.Array) -> jax.Array:
    """Returns bfloat16 as its bits (uint16) where a CPU is traced for, and anything else as it is."""
    if x.dtype == jnp.bfloat16 and current_platform() == "cpu":
        return lax.bitcast_convert_type(x, jnp.uint16)
    return x


def as_numbers(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns what `as_bits` made of numbers of `dtype` as such numbers again."""
    bits = dtype == jnp.bfloat16 and x.dtype == jnp.uint16
    return lax.bitcast_convert_type(x, jnp.bfloat16) if bits else x


def row_major(x: jax.Array) -> jax.Array:
    """Returns x; where a TPU is traced for, with the last axis innermost in memory.

    Of products with weights: without it the compiler wants q, k and v of a prefill turned around, and for
    that holds the weights of all layers a second time, turned around too.
    """
    if current_platform() != "tpu":
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
