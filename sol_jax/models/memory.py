"""Whether a model's weights fit into memory, told before they are read.

A machine that runs out of memory ends the program without a word, or with a page of a library's.
"""

import contextlib
import math
import pathlib

import jax

from sol_jax.errors import UserError
from sol_jax.models.llama import LlamaConfig, Weights, abstract_weights

_HOST = pathlib.Path("/proc/meminfo")
# What a container is limited to, by the two versions of Linux' control groups.  What they say is in use holds
# files that would make room, so it is not looked at.
_LIMITS = (
    pathlib.Path("/sys/fs/cgroup/memory.max"),
    pathlib.Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def weight_bytes(cfg: LlamaConfig, shardings: Weights | None = None) -> int:
    """Bytes of all weights in `cfg.dtype`, or of a device's part of them."""
    leaves = jax.tree.leaves(abstract_weights(cfg))
    whole = [leaf.shape for leaf in leaves]
    cuts = jax.tree.leaves(shardings) if shardings else []
    shapes = [cut.shard_shape(shape) for cut, shape in zip(cuts, whole, strict=True)] if cuts else whole
    return sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves, strict=True))


def check_room(path: pathlib.Path, cfg: LlamaConfig, shardings: Weights | None = None) -> None:
    """Raises `UserError`, with what to do, if the weights of the model at `path` cannot fit here."""
    of_device = weight_bytes(cfg, shardings)
    device = jax.local_devices()[0]
    # Devices of a CPU share its memory; into others weights pass a leaf at a time.
    copies = len(jax.tree.leaves(shardings)[0].addressable_devices) if shardings else 1
    free = {f"its {device.platform}": (of_device, device_bytes(device))}
    if device.platform == "cpu":
        free["this machine"] = (of_device * copies, host_bytes())
    for place, (needed, there) in free.items():
        if there is not None and needed > there:
            lower = (
                "take bfloat16 (--dtype, or config.model.dtype)"
                if cfg.dtype == "float32"
                else "take a smaller model"
            )
            raise UserError(
                f"{path}: its weights take {needed / 1e9:.1f} GB in {cfg.dtype}, and {place} has "
                f"{there / 1e9:.1f} GB free; {lower}, or a machine with more memory"
            )


def host_bytes() -> int | None:
    """Memory that this process may still take, where the system says so; its container's, if that is less."""
    free = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        fields = dict(line.split(":", 1) for line in _HOST.read_text().splitlines())
        free.append(sum(int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree")))
    for limit in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            free.append(int(limit.read_text()))
    return min(free) if free else None


def device_bytes(device: jax.Device) -> int | None:
    """Memory that a device still has, where it says so."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
