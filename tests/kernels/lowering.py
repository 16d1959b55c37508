"""Lowering for devices that are not here: XLA needs none until it compiles."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.dispatch import tracing_for

# The custom calls a kernel becomes: Mosaic for TPUs; Triton or Mosaic for GPUs.
CUSTOM_CALLS = {"tpu": ("tpu_custom_call",), "cuda": ("__gpu$xla.gpu.triton", "mosaic_gpu_v2")}
# Lowerings ask for the chip: kind, cores, platform.
CHIPS = {"tpu": ("TPU v5", 1, "tpu"), "cuda": ("NVIDIA H200", 132, "gpu")}


def lowers(fn: Callable[..., Any], *abstract_args: Any, platform: str) -> None:
    """Asserts that `fn` lowers for `platform` ("cuda" or "tpu") and calls a kernel there.

    Ops traced inside choose as they would on that platform.
    """
    targets = CUSTOM_CALLS[platform]
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in targets]
    chip = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice(*CHIPS[platform]))
    with tracing_for(platform), jax.sharding.use_abstract_mesh(chip):
        # A new function, so that jit does not find what was traced for another platform.
        exported = jax.export.export(
            jax.jit(lambda *args: fn(*args)), platforms=[platform], disabled_checks=checks
        )(*abstract_args)
    text = exported.mlir_module()
    assert any(target in text for target in targets), f"no kernel was called; the module is\n{text[:2000]}"
