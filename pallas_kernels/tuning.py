"""The tuned table behind `dispatch.choose`: which kernels exist, what they take, and where they pay.

There is one entry per (op, implementation, platform).  `takes` is what the kernel can run at all, `pays`
where "auto" prefers it to XLA; both map a fact that the op passes to `choose` to the values allowed (a range
or a tuple), and a fact that the op does not pass is not checked.  An op whose entry is missing has no such
kernel.

Nothing here has been measured on a GPU or TPU yet: `pays` follows byte counts there (docs/kernels.md).
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

Conditions = dict[str, Collection[Any]]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Conditions of one kernel: to run, and to be preferred."""

    takes: Mapping[str, Collection[Any]] = dataclasses.field(default_factory=dict)
    pays: Mapping[str, Collection[Any]] | None = None  # None: only when named; {}: always


NO_END = 1 << 62  # range(8, NO_END): at least 8

# A row kernel holds a row in one GPU program's registers, and TPU lanes carry 14-bit indices.
ROW = range(1, 16385)
# Blocks are sized for these types, and products have a form of them; TPUs have no float16.
GPU_TYPES: Conditions = {"dtype": ("float32", "bfloat16", "float16")}
TPU_TYPES: Conditions = {"dtype": ("float32", "bfloat16")}
GPU_ROW, TPU_ROW = GPU_TYPES | {"hidden": ROW}, TPU_TYPES | {"hidden": ROW}
CPU_TYPES: Conditions = {"dtype": ("float32", "bfloat16")}
FLOAT32: Conditions = {"dtype": ("float32",)}
FEW_ROWS: Conditions = {"rows": range(1, 5)}
# Of XLA's time products of 32 rows took 0.69 (float32) and 0.49 (bfloat16), attention of 8 to 32 rows that
# keep half of their pages 0.48 to 0.61 and 0.66 to 1.14; a refresh of 64 tokens took 1.1 in bfloat16.
ROWS_OF_A_PASS: Conditions = {"rows": range(1, 33)}
HEAD: Conditions = {"head_size": range(1, 257)}
# A block of eight such pages, of 256 float32 channels, is what a TPU's kernel still holds.
PAGE_OF_EIGHTS: Conditions = {"page_size": range(8, 257, 8)}

# TPU kernels have been compiled (`make tpu-check`) and interpreted but never run, so they must be named.
TABLE: dict[tuple[str, str, str], Kernel] = {
    # A kernel is one launch where XLA's bisection takes one a bit, whatever the shape.
    ("keep_channels", "pallas", "gpu"): Kernel(takes=GPU_ROW, pays={}),
    ("keep_channels", "pallas", "tpu"): Kernel(takes=TPU_ROW),
    ("norm_prune", "pallas", "gpu"): Kernel(takes=GPU_ROW, pays={}),
    ("norm_prune", "pallas", "tpu"): Kernel(takes=TPU_ROW),
    # A kernel reads the row once, and divides as IEEE 754 asks, which XLA's GPU code does not.
    ("fake_quantize", "pallas", "gpu"): Kernel(takes=GPU_ROW, pays={}),
    ("fake_quantize", "pallas", "tpu"): Kernel(takes=TPU_ROW),
    ("quantize_residual", "pallas", "gpu"): Kernel(takes=GPU_ROW, pays={}),
    ("quantize_residual", "pallas", "tpu"): Kernel(takes=TPU_ROW),
    # At keep 0.4 two rows together keep 0.63 of the channels, four 0.85: the dense product reads little more
    # and has tensor cores.  Small matrices stay in the second-level cache, where gathering saves nothing.
    ("gated_hidden", "pallas", "gpu"): Kernel(
        takes=GPU_ROW, pays={"rows": (1, 2), "hidden": range(2048, NO_END)}
    ),
    ("gated_hidden", "triton", "gpu"): Kernel(takes=GPU_ROW),
    # In whole tiles of a TPU's memory.
    ("gated_hidden", "pallas", "tpu"): Kernel(
        takes=TPU_TYPES | {"hidden": range(8, 16385, 8), "ffn": range(128, NO_END, 128)}
    ),
    # Kernels are two launches against XLA's loop of 32; a program holds a head's scores in registers.
    ("page_bounds", "pallas", "gpu"): Kernel(
        takes=GPU_TYPES | {"tokens": range(1, NO_END)}, pays={"tokens": range(512, NO_END)}
    ),
    ("page_bounds", "pallas", "tpu"): Kernel(takes=TPU_TYPES | PAGE_OF_EIGHTS | {"tokens": range(1, NO_END)}),
    ("select_pages", "pallas", "gpu"): Kernel(takes=GPU_TYPES | {"pages": range(1, 32769)}, pays={}),
    # The scores of all rows of a head stay on the chip, with their order and masks of used and kept pages 20
    # bytes each.  A kernel has 16 MB unless it is told otherwise, and a v4 has no more.
    ("select_pages", "pallas", "tpu"): Kernel(
        takes=TPU_TYPES
        | {"pages": range(1, 32769), "select": ("head",), "scores_of_a_head": range(1, (1 << 19) + 1)}
    ),
    # A CPU's kernels read a row's weights at the rate of the memory, which XLA's products do not.  Over many
    # rows XLA's large products win, and almost every channel and page is in some row.
    ("project", "native", "cpu"): Kernel(takes=CPU_TYPES, pays=ROWS_OF_A_PASS),
    ("match", "native", "cpu"): Kernel(takes=CPU_TYPES, pays=FEW_ROWS),
    ("gated_hidden", "native", "cpu"): Kernel(takes=CPU_TYPES, pays=ROWS_OF_A_PASS),
    ("attend", "native", "cpu"): Kernel(takes=CPU_TYPES, pays=ROWS_OF_A_PASS),
    ("select_pages", "native", "cpu"): Kernel(takes=CPU_TYPES, pays=FEW_ROWS),
    ("page_bounds", "native", "cpu"): Kernel(takes=CPU_TYPES, pays={}),
    ("keep_channels", "native", "cpu"): Kernel(takes=FLOAT32, pays=FEW_ROWS),
    ("norm_prune", "native", "cpu"): Kernel(takes=FLOAT32, pays=FEW_ROWS),
    ("fake_quantize", "native", "cpu"): Kernel(takes=FLOAT32, pays=FEW_ROWS),
    ("quantize_residual", "native", "cpu"): Kernel(takes=FLOAT32, pays=FEW_ROWS),
    # Of bfloat16 alone (`cache`): XLA makes a copy of the whole array for it.
    ("cut", "native", "cpu"): Kernel(pays={}),
    ("put", "native", "cpu"): Kernel(pays={}),
    # `attend` always asks again once it knows the rows: few of them read a list of pages (`paged_attention`),
    # which pays from 10,000 (8B) to 20,000 cached tokens on; many share every page (`shared_attention`).
    ("attend", "pallas", "gpu"): Kernel(pays={}),
    ("attend", "triton", "gpu"): Kernel(),
    ("attend", "pallas", "tpu"): Kernel(),
    ("paged_attention", "pallas", "gpu"): Kernel(
        takes=GPU_TYPES | HEAD, pays={"tokens": range(16384, NO_END)}
    ),
    ("paged_attention", "triton", "gpu"): Kernel(takes=GPU_TYPES | HEAD),
    ("paged_attention", "pallas", "tpu"): Kernel(takes=TPU_TYPES | HEAD | PAGE_OF_EIGHTS),
    # XLA's form reads the prefix once for all rows as well, and the rows want nearly every page: no count of
    # bytes prefers the kernel (it spares the logits' way through memory), so a measurement must.
    ("shared_attention", "pallas", "gpu"): Kernel(takes=GPU_TYPES | HEAD),
    ("shared_attention", "pallas", "tpu"): Kernel(
        takes=TPU_TYPES | HEAD | PAGE_OF_EIGHTS | {"rows": range(1, 513)}
    ),
}
