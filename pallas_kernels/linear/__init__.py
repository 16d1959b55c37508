"""Products of a row with weights: a decode step's dense projections, and the match with a table of vectors.

`reference` has the maths; `op` has the functions to call, which run it or the kernels in `native`.
"""

from pallas_kernels.linear.op import match, project

__all__ = ["match", "project"]
