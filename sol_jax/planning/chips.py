"""What the makers publish of each chip: memory, peak rates, links.  Rates are bytes or operations a second.

Of one device as JAX counts them: a TPU7x chip is two.  Links are one way, all ports of a device together.
`float32` is the rate of products of float32 operands as JAX makes them by default: a TPU rounds the operands
to bfloat16, an NVIDIA GPU to TF32.
"""

import dataclasses
from typing import Literal

GB, GIB, TERA = 1e9, 2**30, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device.  `memory` is what programs may use of it, in bytes."""

    name: str
    kind: Literal["tpu", "gpu", "cpu"]
    dims: int  # numbers in the shape of a slice
    memory: float
    bfloat16: float
    float32: float
    bandwidth: float  # of its memory
    links: float  # to the devices of its slice or machine
    network: float  # to other slices or machines
    source: str
    per_chip: int = 1  # devices
    slice_chips: int = 0  # the most that a slice has; of GPUs, that a machine has

    def rate(self, dtype: str) -> float:
        """Peak operations a second of products with operands of `dtype`."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32


_TPU_DOCS = "https://docs.cloud.google.com/tpu/docs/"
# The memory of TPUs is what libtpu gives to a program, a little less than the chip's: it is in the message
# with which the compiler refuses one that is too large.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", "tpu", 3, 30.75 * GIB, 275 * TERA, 275 * TERA, 1228 * GB, 300 * GB, 6.25 * GB,
            _TPU_DOCS + "v4", slice_chips=4096,
        ),
        Chip(
            "v5e", "tpu", 2, 15.75 * GIB, 197 * TERA, 197 * TERA, 819 * GB, 200 * GB, 3.125 * GB,
            _TPU_DOCS + "v5e", slice_chips=256,
        ),
        Chip(
            "v5p", "tpu", 3, 95.74 * GIB, 459 * TERA, 459 * TERA, 2765 * GB, 600 * GB, 6.25 * GB,
            _TPU_DOCS + "v5p", slice_chips=6144,
        ),
        Chip(
            "v6e", "tpu", 2, 31.25 * GIB, 918 * TERA, 918 * TERA, 1638 * GB, 400 * GB, 12.5 * GB,
            _TPU_DOCS + "v6e", slice_chips=256,
        ),
        Chip(
            "tpu7x", "tpu", 3, 94.75 * GIB, 1153.5 * TERA, 1153.5 * TERA, 3690 * GB, 300 * GB, 6.25 * GB,
            _TPU_DOCS + "tpu7x", per_chip=2, slice_chips=9216,
        ),
        # JAX takes three quarters of a GPU's memory at its start unless XLA_PYTHON_CLIENT_MEM_FRACTION says
        # otherwise.
        Chip(
            "a100", "gpu", 1, 0.75 * 80 * GB, 312 * TERA, 156 * TERA, 2039 * GB, 300 * GB, 25 * GB,
            "https://www.nvidia.com/en-us/data-center/a100/ (SXM, 80 GB)", slice_chips=8,
        ),
        Chip(
            "h100", "gpu", 1, 0.75 * 80 * GB, 989 * TERA, 494 * TERA, 3350 * GB, 450 * GB, 50 * GB,
            "https://www.nvidia.com/en-us/data-center/h100/ (SXM; rates without sparsity)", slice_chips=8,
        ),
        Chip(
            "h200", "gpu", 1, 0.75 * 141 * GB, 989 * TERA, 494 * TERA, 4800 * GB, 450 * GB, 50 * GB,
            "https://www.nvidia.com/en-us/data-center/h200/ (rates without sparsity)", slice_chips=8,
        ),
    )
}  # fmt: skip
