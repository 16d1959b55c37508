"""Compiling for TPUs that are not here: libtpu has the whole compiler, Mosaic for kernels included."""

import functools
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels.dispatch import tracing_for
from sol_jax.errors import UserError
from sol_jax.libtpu import set_flags
from sol_jax.planning.compiled import Compiled, of_executable
from sol_jax.planning.topology import Topology

# What libtpu would ask the machine for, were it a TPU; and its log, of which nothing is meant for users.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several programs may compile at a time, for none of them has a TPU
}


def requirement() -> str:
    """The libtpu of the jax that is installed, which names one exactly, for pip."""
    wanted = (text for text in importlib.metadata.requires("jax") or () if text.startswith("libtpu"))
    return next(wanted).partition(";")[0].strip()


def problem() -> str | None:
    """Says why nothing can be compiled for TPUs here, and what to do about it; None if it can."""
    if importlib.util.find_spec("libtpu") is None:
        return (
            "programs for TPUs are compiled with libtpu, which is not installed: "
            f"pip install --no-deps --target libtpu '{requirement()}', then put libtpu on PYTHONPATH"
        )
    return None


@functools.cache
def devices(topology: Topology) -> tuple[Any, ...]:
    """The devices of a topology, which need not be here.  Raises `UserError` without libtpu."""
    if (found := problem()) is not None:
        raise UserError(found)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    set_flags()
    jax.config.update("jax_platforms", "cpu")  # or JAX looks for a TPU here, since there is libtpu
    shape = "x".join(map(str, topology.shape))
    # A v4 chip's two cores are one device to programs, as a v5p's are.
    more: dict[str, Any] = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    if topology.slices > 1:
        more["num_slices"] = topology.slices
    try:
        described = topologies.get_topology_desc(f"{topology.chip.name}:{shape}", platform="tpu", **more)
    except (RuntimeError, ValueError) as error:  # JAX' own, whose message is libtpu's
        raise UserError(f"--topology: libtpu knows no {topology} ({str(error).splitlines()[0]})") from None
    return tuple(described.devices)


def compile_for_tpu(fn: Callable[..., Any], *args: Any, donate: Sequence[int] = ()) -> Compiled:
    """Compiles `fn` of abstract arguments, whose shardings say for which devices."""
    # A new function, so that jit does not find what was traced for another platform.
    with tracing_for("tpu"):
        lowered = jax.jit(lambda *args: fn(*args), donate_argnums=donate).lower(*args)
    start = time.perf_counter()
    return of_executable(lowered.compile(), time.perf_counter() - start)


def on_one(topology: Topology, tree: Any) -> Any:
    """Abstract arrays on a topology's first device."""
    sharding = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(devices(topology)[:1]), ("one",)), jax.sharding.PartitionSpec()
    )
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
