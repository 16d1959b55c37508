"""What the machine that runs the tests has: kernels of its device are compiled, all others interpreted."""

import pytest

from pallas_kernels.dispatch import current_platform, triton_problem


def interpreted(platform: str) -> bool:
    """Whether kernels for `platform` ("gpu" or "tpu") are interpreted here."""
    return current_platform() != platform


def _has_triton() -> bool:
    return current_platform() == "gpu" and triton_problem() is None


# The implementations beside XLA of an op that has all of them.
IMPLEMENTATIONS = [
    "pallas",
    pytest.param("triton", marks=pytest.mark.skipif(not _has_triton(), reason="needs a GPU and jax-triton")),
]
