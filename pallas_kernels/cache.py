"""How parts of caches, and of weights of stacked layers, are read and written.

bfloat16 is moved as bits: XLA's CPU compiler widens slices and updates of it to float32, and with them the
whole array that they are cut from or written to.
"""

import jax
import jax.numpy as jnp
from jax import lax


def take_layer(stacked: jax.Array, layer: jax.Array) -> jax.Array:
    """Returns `stacked[layer]`."""
    return _as(stacked.dtype, lax.dynamic_index_in_dim(_bits(stacked), layer, 0, keepdims=False))


def cut(x_HxNxd: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns `x[:, start : start + size]`."""
    return _as(x_HxNxd.dtype, lax.dynamic_slice_in_dim(_bits(x_HxNxd), start, size, 1))


def put(x_HxNxd: jax.Array, new_HxMxd: jax.Array, start: jax.Array) -> jax.Array:
    """Returns x with `new` from `start` on; in place, where XLA may."""
    bits = lax.dynamic_update_slice_in_dim(_bits(x_HxNxd), _bits(new_HxMxd), start, 1)
    return _as(x_HxNxd.dtype, bits)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _as(dtype: jnp.dtype, bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, dtype) if dtype == jnp.bfloat16 else bits
