"""How one layer is read from caches or weights of stacked layers."""

import jax
import jax.numpy as jnp
from jax import lax


def take_layer(stacked: jax.Array, layer: jax.Array) -> jax.Array:
    """Returns `stacked[layer]`, moved as bits if it is bfloat16.

    XLA's CPU compiler widens bfloat16 slices to float32, and with them the whole array they are cut from.
    """
    if stacked.dtype != jnp.bfloat16:
        return lax.dynamic_index_in_dim(stacked, layer, 0, keepdims=False)
    bits = lax.dynamic_index_in_dim(lax.bitcast_convert_type(stacked, jnp.uint16), layer, 0, keepdims=False)
    return lax.bitcast_convert_type(bits, jnp.bfloat16)
