"""The tuned table behind `dispatch.choose`: which kernels exist, what they take, and where they pay.

There is one entry per (op, implementation, platform).  `takes` is what the kernel can run at all, `pays`
where "auto" prefers it to XLA; both map a fact that the op passes to `choose` to the values allowed (a range
or a tuple), and a fact that the op does not pass is not checked.  An op whose entry is missing has no such
kernel.

"auto" takes what was measured to pay.  Kernels of GPUs have been compiled (`make gpu-compile-check`), and
those of TPUs (`make tpu-check`), but none has been timed yet (`make gpu-check` times the former): they must
be named.  docs/kernels.md says where counts of bytes expect them to pay.
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
# Of XLA's time products of 32 rows took 0.69 (float32) and 0.49 (bfloat16), but a refresh of 64 tokens 1.1.
ROWS_OF_A_PASS: Conditions = {"rows": range(1, 33)}
HEAD: Conditions = {"head_size": range(1, 257)}
# A block of eight such pages, of 256 float32 channels, is what a TPU's kernel still holds.
PAGE_OF_EIGHTS: Conditions = {"page_size": range(8, 257, 8)}

TABLE: dict[tuple[str, str, str], Kernel] = {
    ("keep_channels", "pallas", "gpu"): Kernel(takes=GPU_ROW),
    ("keep_channels", "pallas", "tpu"): Kernel(takes=TPU_ROW),
    ("norm_prune", "pallas", "gpu"): Kernel(takes=GPU_ROW),
    ("norm_prune", "pallas", "tpu"): Kernel(takes=TPU_ROW),
    ("fake_quantize", "pallas", "gpu"): Kernel(takes=GPU_ROW),
    ("fake_quantize", "pallas", "tpu"): Kernel(takes=TPU_ROW),
    ("quantize_residual", "pallas", "gpu"): Kernel(takes=GPU_ROW),
    ("quantize_residual", "pallas", "tpu"): Kernel(takes=TPU_ROW),
    ("gated_hidden", "pallas", "gpu"): Kernel(takes=GPU_ROW),
    ("gated_hidden", "triton", "gpu"): Kernel(takes=GPU_ROW),
    # In whole tiles of a TPU's memory.
    ("gated_hidden", "pallas", "tpu"): Kernel(
        takes=TPU_TYPES | {"hidden": range(8, 16385, 8), "ffn": range(128, NO_END, 128)}
    ),
    ("page_bounds", "pallas", "gpu"): Kernel(takes=GPU_TYPES | {"tokens": range(1, NO_END)}),
    ("page_bounds", "pallas", "tpu"): Kernel(takes=TPU_TYPES | PAGE_OF_EIGHTS | {"tokens": range(1, NO_END)}),
    # A program holds a head's scores in registers.
    ("select_pages", "pallas", "gpu"): Kernel(takes=GPU_TYPES | {"pages": range(1, 32769)}),
    # The scores of all rows of a head stay on the chip, with their order and masks of used and kept pages 20
    # bytes each.  A kernel has 16 MB unless it is told otherwise, and a v4 has no more.
    ("select_pages", "pallas", "tpu"): Kernel(
        takes=TPU_TYPES
        | {"pages": range(1, 32769), "select": ("head",), "scores_of_a_head": range(1, (1 << 19) + 1)}
    ),
    # A CPU's kernels read a row's weights at the rate of the memory, which XLA's products do not.  Over many
    # rows XLA's large products win.  Attention and the choice of pages pay for any number: with both a
    # rollout of 16 schedules took 0.80 of the time after 1,024 tokens and 0.88 (float32) or 0.96 (bfloat16)
    # after 256, one of 64 schedules 0.71 or 0.82, and 0.83 or 0.88.
    ("project", "native", "cpu"): Kernel(takes=CPU_TYPES, pays=ROWS_OF_A_PASS),
    ("match", "native", "cpu"): Kernel(takes=CPU_TYPES, pays=FEW_ROWS),
    ("gated_hidden", "native", "cpu"): Kernel(takes=CPU_TYPES, pays=ROWS_OF_A_PASS),
    ("attend", "native", "cpu"): Kernel(takes=CPU_TYPES, pays={}),
    ("select_pages", "native", "cpu"): Kernel(takes=CPU_TYPES, pays={}),
    ("page_bounds", "native", "cpu"): Kernel(takes=CPU_TYPES, pays={}),
    ("keep_channels", "native", "cpu"): Kernel(takes=FLOAT32, pays=FEW_ROWS),
    ("norm_prune", "native", "cpu"): Kernel(takes=FLOAT32, pays=FEW_ROWS),
    ("fake_quantize", "native", "cpu"): Kernel(takes=FLOAT32, pays=FEW_ROWS),
    ("quantize_residual", "native", "cpu"): Kernel(takes=FLOAT32, pays=FEW_ROWS),
    # Of bfloat16 alone (`cache`): XLA makes a copy of the whole array for it.
    ("cut", "native", "cpu"): Kernel(pays={}),
    ("put", "native", "cpu"): Kernel(pays={}),
    # `attend` always asks again once it knows the rows: few of them read a list of pages (`paged_attention`),
    # many share every page (`shared_attention`).  What pays of these must pay here too.
    ("attend", "pallas", "gpu"): Kernel(),
    ("attend", "triton", "gpu"): Kernel(),
    ("attend", "pallas", "tpu"): Kernel(),
    ("paged_attention", "pallas", "gpu"): Kernel(takes=GPU_TYPES | HEAD),
    ("paged_attention", "triton", "gpu"): Kernel(takes=GPU_TYPES | HEAD),
    ("paged_attention", "pallas", "tpu"): Kernel(takes=TPU_TYPES | HEAD | PAGE_OF_EIGHTS),
    ("shared_attention", "pallas", "gpu"): Kernel(takes=GPU_TYPES | HEAD),
    ("shared_attention", "pallas", "tpu"): Kernel(
        takes=TPU_TYPES | HEAD | PAGE_OF_EIGHTS | {"rows": range(1, 513)}
    ),
}
