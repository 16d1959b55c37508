"""Attention of one decode step over a shared prefix, of which chosen pages are read, and a suffix of its own.

`reference` has the maths; `op` has the functions to call, which run it or the kernels in `gpu`, `tpu` and
`triton`.
"""

from pallas_kernels.attention.op import LISTED_ROWS, attend, paged_attention
from pallas_kernels.attention.reference import (
    KV,
    Part,
    merge_attention,
    normalize,
    part_attention,
    split_attention,
)

__all__ = [
    "KV",
    "LISTED_ROWS",
    "Part",
    "attend",
    "merge_attention",
    "normalize",
    "paged_attention",
    "part_attention",
    "split_attention",
]
