"""Names of machines: `v5e:4x4`, `v5p:2x2x1`, `h100:8`, `cpu:1`; and of several slices, `v5e:16x16*16`."""

import dataclasses
import math
import os
import re

from sol_jax.errors import UserError
from sol_jax.planning.chips import CHIPS, GB, Chip

EXAMPLES = "v5e:4x4, v5p:2x2x1, v5e:16x16*16 (16 slices), h100:8, h100:8*4 (4 machines), cpu:1"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind, in slices of a shape; of GPUs, in machines."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        times = f"*{self.slices}" if self.slices > 1 else ""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}{times}"

    @property
    def devices_of_slice(self) -> int:
        return math.prod(self.shape) * self.chip.per_chip

    @property
    def num_devices(self) -> int:
        return self.slices * self.devices_of_slice


def parse_topology(text: str) -> Topology:
    """The machines that a name stands for.  Raises `UserError` for a name of none."""
    name = text.partition(":")[0].lower()
    if name != "cpu" and name not in CHIPS:
        near = f" (say {name.split('-')[0]}:..., the chips along each side)" if "-" in name else ""
        known = ", ".join((*CHIPS, "cpu"))
        raise UserError(f"--topology: {text!r} names none of {known}{near}; it must be such as {EXAMPLES}")
    chip = this_cpu() if name == "cpu" else CHIPS[name]
    found = re.fullmatch(r"\w+:(\d{1,4}(?:x\d{1,4})*)(?:\*(\d{1,4}))?", text.lower())
    shape = tuple(map(int, found[1].split("x"))) if found else ()
    if not found or len(shape) != chip.dims or 0 in shape or found[2] == "0":
        form = {1: "8", 2: "4x4", 3: "2x2x1"}[chip.dims]
        raise UserError(
            f"--topology is {text!r}; {chip.name} takes {chip.dims} number{'s' * (chip.dims > 1)}, "
            f"such as {chip.name}:{form}"
        )
    if chip.slice_chips and math.prod(shape) > chip.slice_chips:
        what = "slice" if chip.kind == "tpu" else "machine"
        raise UserError(
            f"--topology is {text!r}; a {what} of {chip.name} has at most {chip.slice_chips} chips: "
            f"write several as {chip.name}:SHAPE*COUNT"
        )
    return Topology(chip, shape, int(found[2] or 1))


def this_cpu() -> Chip:
    """This machine, as one device: its memory, but no published rates."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    nothing = float("nan")
    return Chip("cpu", "cpu", 1, memory, nothing, nothing, nothing, nothing, 1.25 * GB, "this machine")
