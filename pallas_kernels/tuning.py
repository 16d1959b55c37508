"""The tuned table behind `dispatch.choose`: which kernels exist, what they take, and where they pay.

One entry per (op, implementation, platform).  `takes` is what the kernel can run at all, `pays` where "auto"
prefers it to XLA; both map a fact that the op passes to `choose` to the values allowed (a range or a tuple),
and a fact that the op does not pass is not checked.  An op whose entry is missing has no such kernel.

Nothing here has been measured on a GPU or TPU yet: `pays` follows byte counts (README, "Kernels").
"""

import dataclasses
from collections.abc import Container, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Conditions of one kernel: to run, and to be preferred."""

    takes: Mapping[str, Container[Any]] = dataclasses.field(default_factory=dict)
    pays: Mapping[str, Container[Any]] | None = None  # None: only when named; {}: always


NO_END = 1 << 62  # range(8, NO_END): at least 8

# A row kernel holds a row in one GPU program's registers, and TPU lanes carry 14-bit indices.
ROW = range(1, 16385)

# TPU kernels have been lowered and interpreted but never compiled, so they run only when named.
TABLE: dict[tuple[str, str, str], Kernel] = {
    # One launch where XLA's bisection takes one a bit, whatever the shape.
    ("keep_channels", "pallas", "gpu"): Kernel(takes={"hidden": ROW}, pays={}),
    ("keep_channels", "pallas", "tpu"): Kernel(takes={"hidden": ROW}),
    ("norm_prune", "pallas", "gpu"): Kernel(takes={"hidden": ROW}, pays={}),
    ("norm_prune", "pallas", "tpu"): Kernel(takes={"hidden": ROW}),
    # One read of the row; and IEEE division, which XLA's GPU code has not.
    ("fake_quantize", "pallas", "gpu"): Kernel(takes={"hidden": ROW}, pays={}),
    ("fake_quantize", "pallas", "tpu"): Kernel(takes={"hidden": ROW}),
    ("quantize_residual", "pallas", "gpu"): Kernel(takes={"hidden": ROW}, pays={}),
    ("quantize_residual", "pallas", "tpu"): Kernel(takes={"hidden": ROW}),
    # At keep 0.4 two rows together keep 0.63 of the channels, four 0.85: the dense product reads little more
    # and has tensor cores.  Small matrices stay in the second-level cache, where gathering saves nothing.
    ("gated_hidden", "pallas", "gpu"): Kernel(
        takes={"hidden": ROW}, pays={"rows": (1, 2), "hidden": range(2048, NO_END)}
    ),
    ("gated_hidden", "triton", "gpu"): Kernel(takes={"hidden": ROW}),
    ("gated_hidden", "pallas", "tpu"): Kernel(takes={"hidden": ROW, "ffn": range(128, NO_END, 128)}),
}
