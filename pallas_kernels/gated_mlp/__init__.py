"""The gated half of a Llama MLP, `silu(x @ gate) * (x @ up)`, which need not read weights of pruned channels.

`reference` has the maths; `op` has the function to call, which runs it or the kernels in `gpu`, `tpu` and
`triton`.
"""

from pallas_kernels.gated_mlp.op import MAX_ROWS, gated_hidden

__all__ = ["MAX_ROWS", "gated_hidden"]
