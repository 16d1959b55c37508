"""The operations behind the three efficiency axes, one file each, free of anything of `sol_jax`.

An op's own file holds its reference in XLA and picks the implementation; its kernels lie beside it, in files
that end in the device or language: `_gpu` (Pallas through Triton), `_tpu` (Pallas through Mosaic), `_triton`
(Triton's own language, through jax-triton).

`quest`     page bounds, scores and choice     `topk`     exact threshold selection
`decode`    attention over prefix and suffix   `prefill`  dense causal attention
`prune`     channel pruning, with the norm     `mlp`      gate and up of the channels that are left
`quantize`  rounding to a number of bits, with the residual and the next norm      `norm`  RMSNorm

Shared: `dispatch` (which implementation runs, or why not), `tuning` (where each exists and pays), `shapes`
(the named shapes of tests and benchmarks), `one_row` and `fold` (vmaps as rows of one call), `rows_gpu` and
`rows_tpu` (calls of kernels of rows), `cache` (layers of stacked arrays), `errors`, `cost_model` (time from
bytes, operations and launches).
"""
