"""The gated half of a Llama MLP in plain JAX: dense products with operands of the weights' dtype."""

import jax
import jax.numpy as jnp

from pallas_kernels.cache import take_layer


def gated_hidden(
    x_D: jax.Array, gate_DxF: jax.Array, up_DxF: jax.Array, layer: jax.Array | None = None
) -> jax.Array:
    """Returns `silu(x @ gate) * (x @ up)`: [..., F], summed in float32, for x [..., D].

    With `layer` gate and up are stacked, [L, D, F], and one layer of them is taken.
    """
    if layer is not None:
        gate_DxF, up_DxF = take_layer(gate_DxF, layer), take_layer(up_DxF, layer)

    def dot(w_DxF: jax.Array) -> jax.Array:
        return jnp.tensordot(x_D.astype(w_DxF.dtype), w_DxF, 1, preferred_element_type=jnp.float32)

    return jax.nn.silu(dot(gate_DxF)) * dot(up_DxF)
