"""What importing the package brings along: no extra, and nothing of `sol_jax`."""

import pkgutil
import subprocess
import sys

import pallas_kernels

# The one module that needs the extra `triton` to be imported; its op does so when it calls the kernel.
NEEDS_TRITON = "pallas_kernels.gated_mlp.triton"
# What is no module, and what setuptools alone imports.
FOR_PIP = {"pallas_kernels.native._library", "pallas_kernels.native.build"}
FOREIGN = {"triton", "jax_triton", "sol_jax", "experiments", "flax", "optax"}


def test_the_package_imports_jax_and_numpy_alone():
    """A machine of kernels has little else, and a module that brings Triton along would need its extra."""
    found = [found.name for found in pkgutil.walk_packages(pallas_kernels.__path__, "pallas_kernels.")]
    assert NEEDS_TRITON in found
    wanted = [name for name in found if name != NEEDS_TRITON and name not in FOR_PIP]
    assert "pallas_kernels.attention.triton" in wanted
    program = f"import sys, {', '.join(wanted)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pallas_kernels" in ran.stdout.split()
    assert FOREIGN & set(ran.stdout.split()) == set()
