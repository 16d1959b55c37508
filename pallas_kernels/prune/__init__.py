"""Structured activation pruning: the largest channels of a row are kept, alone or with the norm before it.

`reference` has the maths; `op` has the functions to call, which run it or the kernels in `gpu` and `tpu`.
"""

from pallas_kernels.prune.op import keep_channels, norm_prune
from pallas_kernels.prune.reference import Pruned

__all__ = ["Pruned", "keep_channels", "norm_prune"]
