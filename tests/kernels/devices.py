"""What the machine that runs the tests has: kernels of its device are compiled, all others interpreted."""

from types import ModuleType

import pytest

from pallas_kernels.dispatch import current_platform, triton_problem


def interpreted(platform: str) -> bool:
    """Whether kernels for `platform` ("gpu" or "tpu") are interpreted here."""
    return current_platform() != platform


def interpret(kernels: ModuleType) -> bool:
    """Says the same of a module of kernels, whose name ends in its platform."""
    return interpreted(kernels.__name__.rsplit(".", 1)[-1])


def either(*modules: ModuleType) -> pytest.MarkDecorator:
    """Parametrises `kernels` by the GPU's module of an op's kernels and the TPU's."""
    return pytest.mark.parametrize("kernels", modules, ids=["gpu", "tpu"])


def _has_triton() -> bool:
    return current_platform() == "gpu" and triton_problem() is None


# The implementations beside XLA of an op that has all of them.
IMPLEMENTATIONS = [
    "pallas",
    pytest.param("triton", marks=pytest.mark.skipif(not _has_triton(), reason="needs a GPU and jax-triton")),
]
