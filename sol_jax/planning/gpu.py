"""Compiling for NVIDIA GPUs that are not here: jax's plugin for CUDA has the compiler, and needs no driver.

XLA makes PTX of a program, Pallas' kernels through Triton included, and NVIDIA's ptxas machine code of that.
Both come from packages (`requirements`), which need a folder of their own: beside jax every program would
look for a GPU.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels.dispatch import tracing_for
from sol_jax.errors import UserError
from sol_jax.planning.chips import CHIPS
from sol_jax.planning.compiled import Compiled, of_executable

# Registers and spills are ptxas', each version's own.  XLA takes any that it finds, so it is told which.
CUDA = "13.5.37"
TRITON = "3.6.0"  # which compiles kernels in its own language; XLA's is built in


@dataclasses.dataclass(frozen=True)
class Target:
    """What XLA wants to know of a GPU, beside what `chips.CHIPS` has; sizes in bytes.

    From NVIDIA's tuning guides and the tables of compute capabilities in the CUDA C++ programming guide; XLA
    publishes descriptions of the same chips in xla/backends/gpu/target_config/specs.
    """

    title: str
    capability: tuple[int, int]
    accelerated: bool  # code for this capability alone (sm_90a), which wgmma needs
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of a core
    clock: float  # GHz, boosted
    shared: int  # of a core
    second_level: int  # cache
    memory: int

    @property
    def architecture(self) -> str:
        """As ptxas calls it."""
        return f"sm_{self.capability[0]}{self.capability[1]}" + "a" * self.accelerated

    @property
    def shared_of_block(self) -> int:
        """The most that one block may ask for; the rest of a core's is the system's."""
        return self.shared - 1024


TARGETS = {
    "h200": Target("NVIDIA H200", (9, 0), True, 132, 128, 1.98, 228 << 10, 50 << 20, 141 << 30),
    "h100": Target("NVIDIA H100 80GB HBM3", (9, 0), True, 132, 128, 1.98, 228 << 10, 50 << 20, 80 << 30),
    "a100": Target("NVIDIA A100-SXM4-80GB", (8, 0), False, 108, 64, 1.41, 164 << 10, 40 << 20, 80 << 30),
}
THREADS = 2048  # resident on a core, of all three
REGISTERS = 65536  # of a core, of all three


def requirements() -> list[str]:
    """What compiling takes, for pip: the plugin of the jax that is installed, without CUDA's libraries."""
    version = importlib.metadata.version("jax")
    plugin = [f"jax-cuda13-{part}=={version}" for part in ("plugin", "pjrt")]
    tools = [f"nvidia-{tool}=={CUDA}" for tool in ("cuda-nvcc", "nvvm", "cuda-nvdisasm")]
    return [*plugin, *tools, f"triton=={TRITON}"]


def problem() -> str | None:
    """Says why nothing can be compiled for NVIDIA GPUs here, and what to do about it; None if it can."""
    asked = " ".join(f"'{text}'" for text in requirements())
    how = f"pip install --no-deps --target cuda {asked}, then put cuda on PYTHONPATH"
    for package, wanted in (text.split("==") for text in requirements()):
        needed = f"programs for NVIDIA GPUs are compiled with {package} {wanted}"
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{needed}, which is not installed: {how}"
        if found != wanted:
            return f"{needed}, and this is {found}: {how}"
    return None


@functools.cache
def cuda_folder() -> pathlib.Path:
    """Where ptxas (bin/ptxas) and libdevice are.  Raises `UserError` without what compiles."""
    if (found := problem()) is not None:
        raise UserError(found)
    spec = importlib.util.find_spec("nvidia.cu13")
    assert spec is not None
    return pathlib.Path(next(iter(spec.submodule_search_locations or ())))


def description(chip: str) -> str:
    """A chip as XLA's GpuTargetConfigProto, in protobuf's text form."""
    target = TARGETS[chip]
    major, minor = target.capability
    extension = "ACCELERATED_FEATURES" if target.accelerated else "NONE"
    return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: {THREADS}
  core_count: {target.cores}
  fpus_per_core: {target.lanes}
  clock_rate_ghz: {target.clock}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: {REGISTERS}
  registers_per_block_limit: {REGISTERS}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {target.shared_of_block}
  shared_memory_per_core: {target.shared}
  l2_cache_size: {target.second_level}
  device_memory_size: {target.memory}
  memory_bandwidth: {int(CHIPS[chip].bandwidth)}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  device_vendor: "NVIDIA Corporation"
  name: "{target.title}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{target.title}"
"""


@functools.cache
def device(chip: str) -> Any:
    """One of `TARGETS`, which need not be here.  Raises `UserError` without what compiles for it."""
    cuda_folder()
    jax.config.update("jax_platforms", "cpu")  # or JAX looks for a GPU here, since there is a plugin for one
    (found,) = topologies.get_topology_desc(
        "", platform="cuda", target_config=description(chip), topology="1x1x1"
    ).devices
    return found


def on_one(chip: str, tree: Any) -> Any:
    """Abstract arrays on a chip."""
    mesh = jax.sharding.Mesh(np.array([device(chip)]), ("one",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compile_for_gpu(
    fn: Callable[..., Any],
    *args: Any,
    donate: Sequence[int] = (),
    dump: pathlib.Path | None = None,
) -> Compiled:
    """Compiles `fn` of abstract arguments, whose shardings say for which chip.

    Products and fusions are as XLA makes them without trying which is fastest, for that takes the chip.
    XLA's notes, PTX among them, go to the folder `dump`.
    """
    options: dict[str, Any] = {
        "xla_gpu_cuda_data_dir": str(cuda_folder()),
        "xla_gpu_autotune_level": 0,
    }
    if dump is not None:
        options["xla_dump_to"] = str(dump)
    # A new function, so that jit does not find what was traced for another platform.
    with tracing_for("gpu"):
        lowered = jax.jit(lambda *args: fn(*args), donate_argnums=donate).lower(*args)
    start = time.perf_counter()
    return of_executable(lowered.compile(options), time.perf_counter() - start)
