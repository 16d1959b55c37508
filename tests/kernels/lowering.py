"""Lowering for devices that are not here: XLA needs none until it compiles."""

import re
from collections.abc import Callable, Set
from typing import Any

import jax

from pallas_kernels.dispatch import tracing_for

# The custom calls a kernel becomes: Mosaic for TPUs; Triton or Mosaic for GPUs.
CUSTOM_CALLS = {"tpu": ("tpu_custom_call",), "cuda": ("__gpu$xla.gpu.triton", "mosaic_gpu_v2")}
# How a module says which kernel a call is of: after the code, for Triton in front of its stages.
NAMES = {"tpu": r'kernel_name = "(\w+)"', "cuda": r'\bname = "(\w+)", num_stages'}
# Lowerings ask for the chip: kind, cores, platform.
CHIPS = {"tpu": ("TPU v5", 1, "tpu"), "cuda": ("NVIDIA H200", 132, "gpu")}


def lowers(fn: Callable[..., Any], *abstract_args: Any, platform: str, kernels: Set[str]) -> None:
    """Asserts that `fn` lowers for `platform` ("cuda" or "tpu") and calls `kernels` there, and no others.

    Ops traced inside choose as they would on that platform.
    """
    targets = CUSTOM_CALLS[platform]
    allowed = (*targets, "LayoutConstraint")  # which is no kernel: see `row_major`
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in allowed]
    chip = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice(*CHIPS[platform]))
    with tracing_for(platform), jax.sharding.use_abstract_mesh(chip):
        # A new function, so that jit does not find what was traced for another platform.
        exported = jax.export.export(
            jax.jit(lambda *args: fn(*args)), platforms=[platform], disabled_checks=checks
        )(*abstract_args)
    text = exported.mlir_module()
    found = set(re.findall(NAMES[platform], text))
    assert found == kernels, f"these kernels were called: {found or 'none'}; the module is\n{text[:2000]}"
    assert bool(found) == any(f"@{target}(" in text for target in targets)
