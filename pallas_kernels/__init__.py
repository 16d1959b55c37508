"""The operations behind the three efficiency axes, with kernels for the devices where they pay.

Nothing here imports `sol_jax`.  Each operation has a folder:

    quest      (kappa)  page bounds, page scores, and the choice of pages that attention reads
    attention  (kappa)  attention of a decode step over chosen pages of a prefix, and over a suffix
    prune      (rho)    the largest channels of a row, alone or with the norm before it
    gated_mlp  (rho)    gate and up of an MLP, over the channels that are left
    linear              products of a row with weights, and with a table of vectors
    quantize   (eta)    rounding to a number of bits, alone or with the residual and the next norm

In a folder, `op.py` has the functions to call, each of which picks an implementation with `dispatch.choose`.
`reference.py` has the same maths in plain JAX, which XLA compiles.  Each kernel has a file named after its
device or language: `gpu.py` (Pallas through Triton), `tpu.py` (Pallas through Mosaic), `triton.py` (Triton's
own language through jax-triton, an extra); those for CPUs, in C++, are together in `native`.  The folder
exports what is to be called: `from pallas_kernels.quest import page_bounds`.  A new implementation is a file
in the folder, a call of it in `op.py`, its rows in `tuning.TABLE` and, if it is of a new kind, its name in
`dispatch.IMPLEMENTATIONS`.

Beside the folders lies what several operations share, and what XLA does everywhere:

    which runs   `dispatch` chooses, or says why a named one cannot run (`errors`); `tuning` is the table
                 behind it, of which kernels exist, what they take and where they pay
    maths        `topk` (exact threshold selection), `norm` (RMSNorm), `causal_attention` (dense, for prefill)
    calls        `one_row` and `fold` (vmaps become rows of one call), `rows_gpu` and `rows_tpu` (kernels of
                 rows), `products` (matrix products inside kernels), `cache` (layers of stacked arrays)
    measuring    `shapes` (the named shapes of tests and benchmarks), `cost_model` (time from bytes,
                 operations and launches)
"""
