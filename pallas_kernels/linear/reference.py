"""Products of rows with weights in plain JAX: operands of the weights' dtype, sums in float32."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cache import take_layer


def project(
    x_D: jax.Array, weights: tuple[jax.Array, ...], layer: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """Returns `x @ w` [..., F] for each of the weights [D, F], or [L, D, F] with `layer`."""
    of_layer = weights if layer is None else (take_layer(w, layer) for w in weights)
    return tuple(
        jnp.tensordot(x_D.astype(w.dtype), w, 1, preferred_element_type=jnp.float32) for w in of_layer
    )


def match(x_D: jax.Array, table_VxD: jax.Array) -> jax.Array:
    """Returns the scalar products [..., V] of x [..., D] with each row of the table."""
    last = (((x_D.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x_D.astype(table_VxD.dtype), table_VxD, last, preferred_element_type=jnp.float32)
