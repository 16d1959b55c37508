"""What NVIDIA's assembler makes of a kernel: registers, spills, shared memory, blocks that fit a core.

`ptxas -v` tells them for each kernel of a file of PTX; `sass` adds the loads that are under way.
"""

import dataclasses
import pathlib
import re
import subprocess

from experiments.benchmarks.sass import disassemble, under_way
from sol_jax.planning.gpu import REGISTERS, THREADS, Target

WARP = 32
ALLOTTED = 256  # registers are given out to warps by so many
BLOCKS = 32  # resident on a core, at most
RESERVED = 1024  # bytes of shared memory that the system takes for each block


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """What a kernel takes; `spilled` are the bytes that a thread stores to and loads from local memory.

    `load_bytes` are what a thread asks for before it waits (`sass.under_way`).
    """

    name: str
    threads: int  # of a block
    registers: int  # of a thread
    spilled: int
    shared: int  # bytes of a block; what its launch asks for besides is not in PTX
    barriers: int = 0
    load_bytes: int = 0

    def blocks(self, target: Target) -> int:
        """How many of its blocks a core holds at once, as its registers, threads and shared memory allow."""
        warps = -(-self.threads // WARP)
        of_warp = -(-self.registers * WARP // ALLOTTED) * ALLOTTED
        return min(
            BLOCKS,
            THREADS // (warps * WARP),
            REGISTERS // of_warp // warps,
            target.shared // (self.shared + RESERVED),
        )


def assemble(ptx: pathlib.Path, target: Target, tools: pathlib.Path) -> list[KernelUse]:
    """Runs ptxas and nvdisasm, both of the folder `tools`, on a file, beside which machine code is left.

    nvdisasm takes minutes for some of XLA's reductions.  Raises RuntimeError with the first complaint where
    one refuses.
    """
    code = ptx.with_suffix(".cubin")
    command = [
        str(tools / "ptxas"),
        "-v",
        f"--gpu-name={target.architecture}",
        f"--output-file={code}",
        str(ptx),
    ]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"ptxas refused {ptx.name}: {(ran.stderr or ran.stdout).strip().splitlines()[0]}")
    uses = parse(ran.stderr + ran.stdout, ptx.read_text())
    loads = under_way(disassemble(code, tools / "nvdisasm"))
    return [dataclasses.replace(use, load_bytes=loads[use.name]) for use in uses]


def parse(said: str, ptx: str) -> list[KernelUse]:
    """The kernels of what `ptxas -v` says of a text of PTX.  Raises ValueError where something is missing."""
    found = []
    for part in said.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        if spills is None or used is None:
            raise ValueError(f"ptxas tells no registers or spills of {name}")
        shared, barriers = (
            re.search(rf"{what}", part) for what in (r"(\d+) bytes smem", r"used (\d+) barriers")
        )
        found.append(
            KernelUse(
                name,
                _threads(name, ptx),
                int(used[1]),
                int(spills[1]) + int(spills[2]),
                int(shared[1]) if shared else 0,
                int(barriers[1]) if barriers else 0,
            )
        )
    return found


def _threads(name: str, ptx: str) -> int:
    """Threads of a block, which the kernel's own directive gives.  Raises ValueError without one."""
    code = re.split(rf"\.entry {re.escape(name)}\(", ptx)[-1].split(".entry")[0]
    found = re.search(r"\.(?:reqntid|maxntid) (\d+)(?:, (\d+))?(?:, (\d+))?", code)
    if found is None:
        raise ValueError(f"PTX tells no threads of {name}")
    x, y, z = (int(size or 1) for size in found.groups())
    return x * y * z
