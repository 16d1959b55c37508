"""The operations behind the three efficiency axes, one file each, free of anything of `sol_jax`.

`topk`      exact threshold selection          `quest`    page bounds and scores
`prune`     channel pruning                    `quantize` rounding to a number of bits
`decode`    attention over prefix and suffix   `prefill`  dense causal attention
"""
