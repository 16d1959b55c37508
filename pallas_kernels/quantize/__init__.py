"""Symmetric quantisation of a row to a number of bits and back, alone or with the residual and next norm.

`reference` has the maths; `op` has the functions to call, which run it or the kernels in `gpu` and `tpu`.
"""

from pallas_kernels.quantize.op import fake_quantize, quantize_residual
from pallas_kernels.quantize.reference import MAX_BITS

__all__ = ["MAX_BITS", "fake_quantize", "quantize_residual"]
