"""The gated MLP's operation, which picks an implementation: `reference` in XLA, or a kernel.

The kernels are in `gpu` and `tpu` (Pallas) and in `triton` (jax-triton, for NVIDIA GPUs).
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import native
from pallas_kernels.dispatch import (
    choose,
    current_platform,
    interpret,
    log_once,
    no_gradient,
    without_triton,
)
from pallas_kernels.gated_mlp import gpu, reference, tpu
from pallas_kernels.one_row import one_row

# The most rows that each kernel takes: with more, almost every channel is in some row, and a dense product
# reads no more.  The CPU's takes any, and its entry of the table says up to where it pays.
MAX_ROWS = {"pallas": 3, "triton": 1}


def gated_hidden(
    x_D: jax.Array,
    gate_DxF: jax.Array,
    up_DxF: jax.Array,
    implementation: str | None = None,
    layer: jax.Array | None = None,
) -> jax.Array:
    """Returns `silu(x @ gate) * (x @ up)`: [..., F], float32, for x [..., D] whose pruned channels are zero.

    Operands have the weights' dtype, sums are float32.  Kernels skip a channel that is zero in every row
    (vmaps over x add rows), whatever its weights; NaN is not zero.  jax-triton has a kernel of one row alone,
    so "triton" is Pallas' kernel with more.  Beyond its MAX_ROWS an implementation is the dense product of
    the zeroed inputs, which is logged.

    With `layer` (int32) gate and up are stacked, [L, D, F], and a kernel reads the layer in place.  A slice
    of them would be copied before a kernel sees it, at a higher cost than the kernel saves.
    """
    op = "gated_hidden"
    facts: dict[str, Any] = {"hidden": x_D.shape[-1], "ffn": gate_DxF.shape[-1], "dtype": gate_DxF.dtype.name}
    if choose(op, implementation, asks_again=True, **facts) == "xla":
        return no_gradient(op, reference.gated_hidden)(x_D, gate_DxF, up_DxF, layer)

    def rows(x_NxD: jax.Array, layer: jax.Array, gate_LxDxF: jax.Array, up_LxDxF: jax.Array) -> jax.Array:
        # The op chooses once more, for the rows are known only here.
        count = len(x_NxD)
        name = implementation if count <= MAX_ROWS["triton"] else without_triton(implementation)
        picked = choose(op, name, rows=count, **facts)
        if count > MAX_ROWS.get(picked, count):
            log_once(
                f"{op} is dense, for {picked} takes {MAX_ROWS[picked]} rows at most", rows=count, **facts
            )
            picked = "xla"
        if picked == "xla":
            return reference.gated_hidden(x_NxD, gate_LxDxF, up_LxDxF, layer)
        if picked == "native":
            out = [native.floats(count, gate_LxDxF.shape[-1])]
            x_NxD = x_NxD.astype(jnp.float32)
            return native.call("project", out, x_NxD, layer, gate_LxDxF, up_LxDxF, gated=True)[0]
        x_NxD = x_NxD.astype(gate_LxDxF.dtype)
        if picked == "triton":
            from pallas_kernels.gated_mlp import triton  # which imports triton, an extra

            return triton.gated_hidden(x_NxD, layer, gate_LxDxF, up_LxDxF)
        kernels = tpu if current_platform() == "tpu" else gpu
        return kernels.gated_hidden(x_NxD, layer, gate_LxDxF, up_LxDxF, interpret())

    stacked = (jnp.int32(0), gate_DxF[None], up_DxF[None]) if layer is None else (layer, gate_DxF, up_DxF)
    hidden = no_gradient(op, one_row(rows, num_shared=3))

    def of_row(x_D: jax.Array) -> jax.Array:
        return hidden(x_D, *stacked)

    return jnp.vectorize(of_row, signature="(d)->(f)")(x_D)
