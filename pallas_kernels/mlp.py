"""The gated half of a Llama MLP, reading only the weights of channels that its input has."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mlp_gpu, mlp_tpu
from pallas_kernels.cache import take_layer
from pallas_kernels.dispatch import (
    choose,
    current_platform,
    interpret,
    logged,
    no_gradient,
    without_triton,
)
from pallas_kernels.one_row import one_row

# The kernels' most rows: with more, almost every channel is in some row, and a dense product reads no more.
MAX_ROWS = {"pallas": 3, "triton": 1}


def gated_hidden(
    x_D: jax.Array,
    gate_DxF: jax.Array,
    up_DxF: jax.Array,
    implementation: str | None = None,
    layer: jax.Array | None = None,
) -> jax.Array:
    """`silu(x @ gate) * (x @ up)`: [..., F], float32, for x [..., D] whose pruned channels are zero.

    Operands have the weights' dtype, sums are float32.  Kernels skip a channel that is zero in every row
    (vmaps over x add rows), whatever its weights; NaN is not zero.  jax-triton has a kernel of one row alone:
    "triton" is Pallas' with more.  Beyond MAX_ROWS rows every implementation is the dense product of the
    zeroed inputs, which is logged.

    With `layer` (int32) gate and up are stacked, [L, D, F], and a kernel reads the layer in place.  A slice
    of them would be copied before a kernel sees it, at a higher cost than the kernel saves.
    """
    op = "gated_hidden"
    facts: dict[str, Any] = {"hidden": x_D.shape[-1], "ffn": gate_DxF.shape[-1], "dtype": gate_DxF.dtype.name}

    def dense(x_NxD: jax.Array, layer: Any, gate: jax.Array, up: jax.Array, **more: int) -> jax.Array:
        return _dense(logged(x_NxD, op, implementation, "xla", **more, **facts), layer, gate, up)

    if choose(op, implementation, log=False, **facts) == "xla":
        return no_gradient(op, dense)(x_D, layer, gate_DxF, up_DxF)

    def rows(x_NxD: jax.Array, layer: jax.Array, gate_LxDxF: jax.Array, up_LxDxF: jax.Array) -> jax.Array:
        # Once more, for only here are the rows known.
        count = len(x_NxD)
        name = implementation if count <= MAX_ROWS["triton"] else without_triton(implementation)
        picked = choose(op, name, log=False, rows=count, **facts)
        if picked == "xla" or count > MAX_ROWS[picked]:
            return dense(x_NxD, layer, gate_LxDxF, up_LxDxF, rows=count)
        x_NxD = logged(x_NxD, op, implementation, picked, rows=count, **facts).astype(gate_LxDxF.dtype)
        if picked == "triton":
            from pallas_kernels import mlp_triton  # imports triton

            return mlp_triton.gated_hidden(x_NxD, layer, gate_LxDxF, up_LxDxF)
        kernels = mlp_tpu if current_platform() == "tpu" else mlp_gpu
        return kernels.gated_hidden(x_NxD, layer, gate_LxDxF, up_LxDxF, interpret())

    stacked = (jnp.int32(0), gate_DxF[None], up_DxF[None]) if layer is None else (layer, gate_DxF, up_DxF)
    hidden = no_gradient(op, one_row(rows, num_shared=3))

    def of_row(x_D: jax.Array) -> jax.Array:
        return hidden(x_D, *stacked)

    return jnp.vectorize(of_row, signature="(d)->(f)")(x_D)


def _dense(x: jax.Array, layer: jax.Array | None, gate: jax.Array, up: jax.Array) -> jax.Array:
    if layer is not None:
        gate, up = take_layer(gate, layer), take_layer(up, layer)

    def dot(w_DxF: jax.Array) -> jax.Array:
        return jnp.tensordot(x.astype(w_DxF.dtype), w_DxF, 1, preferred_element_type=jnp.float32)

    return jax.nn.silu(dot(gate)) * dot(up)
