"""Quest's choice of pages (arXiv 2406.10774): bounds of each page of keys, scores by a query, the best pages.

`reference` has the maths; `op` has the functions to call, which run it or the kernels in `gpu` and `tpu`.
"""

from pallas_kernels.quest.op import Select, extend_bounds, page_bounds, select_pages
from pallas_kernels.quest.reference import page_scores

__all__ = ["Select", "extend_bounds", "page_bounds", "page_scores", "select_pages"]
