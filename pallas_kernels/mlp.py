"""The gated half of a Llama MLP, reading only the weights of channels that its input has."""

import jax
import jax.numpy as jnp

from pallas_kernels import mlp_gpu, mlp_tpu
from pallas_kernels.cache import take_layer
from pallas_kernels.dispatch import choose, current_platform, interpret, no_gradient
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
    (vmaps over x add rows), whatever its weights; NaN is not zero.  Beyond MAX_ROWS rows every implementation
    is the dense product of the zeroed inputs.

    With `layer` (int32) gate and up are stacked, [L, D, F], and a kernel reads the layer in place.  A slice
    of them would be copied before a kernel sees it, at a higher cost than the kernel saves.
    """
    op, D, F = "gated_hidden", x_D.shape[-1], gate_DxF.shape[-1]
    if choose(op, implementation, hidden=D, ffn=F) == "xla":
        return _dense(x_D, layer, gate_DxF, up_DxF)

    def rows(x_NxD: jax.Array, layer: jax.Array, gate_LxDxF: jax.Array, up_LxDxF: jax.Array) -> jax.Array:
        # Once more, for only here are the rows known.
        picked = choose(op, implementation, rows=len(x_NxD), hidden=D, ffn=F)
        if len(x_NxD) > MAX_ROWS.get(picked, 0):
            return _dense(x_NxD, layer, gate_LxDxF, up_LxDxF)
        x_NxD = x_NxD.astype(gate_LxDxF.dtype)
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
