"""A JAX that nobody tried is told, before anything of it can fail; what is deprecated is an error here."""

import subprocess
import sys
import warnings

import pytest

from sol_jax.jax_version import newer_jax


@pytest.mark.parametrize(
    ("version", "told"),
    [("0.10.2", ""), ("0.12.9", ""), ("0.12.0.1", ""), ("0.13.0.dev2", "<0.13"), ("1.0", "1.0"), ("", "")],
)
def test_a_newer_jax_is_told_in_one_sentence(version, told):
    said = newer_jax(version)
    assert bool(said) == bool(told)
    assert told in said
    assert "\n" not in said


def test_it_is_told_even_if_that_jax_cannot_be_imported():
    program = (
        "import importlib.metadata, sys; importlib.metadata.version = lambda name: '0.99.1'; "
        "sys.modules['jax'] = None; import sol_jax; import sol_jax.generate"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode != 0
    first, rest = ran.stderr.split("\n", 1)
    assert first.endswith("jax 0.99.1 is newer than any that this was tried with (0.12): if something fails, "
                          "pip install 'jax<0.13'")  # fmt: skip
    assert "ImportError" in rest or "ModuleNotFoundError" in rest


@pytest.mark.parametrize(
    "module", ["sol_jax.models.llama", "pallas_kernels", "configs.demo", "experiments.publish"]
)
@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_what_is_deprecated_is_an_error_in_our_code(kind, module):
    with pytest.raises(kind, match="old"):
        warnings.warn_explicit("old", kind, "file.py", 1, module=module)
    with pytest.warns(kind, match="old"):
        warnings.warn_explicit("old", kind, "file.py", 1, module="jax._src.core")
