"""What libtpu is started with: added once, only where it is known to be understood."""

import importlib.metadata

import pytest

from sol_jax import libtpu


@pytest.mark.parametrize(
    ("version", "given", "wanted"),
    [
        ("0.0.42.1", "", libtpu.LAYERS_ONCE),
        ("0.0.42", "--xla_a=1", f"--xla_a=1 {libtpu.LAYERS_ONCE}"),
        ("0.0.42.1", libtpu.LAYERS_ONCE[:-1] + "2", libtpu.LAYERS_ONCE[:-1] + "2"),  # the user's own
        ("0.0.420", "", ""),  # a flag that a libtpu does not know ends it
        ("0.0.43", "", ""),
        (None, "--xla_a=1", "--xla_a=1"),
    ],
)
def test_layers_are_held_once_where_libtpu_knows_how(version, given, wanted, monkeypatch):
    def found(name):
        if version is None or name != "libtpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
    for _ in range(2):
        libtpu.set_flags()
        assert libtpu.os.environ["LIBTPU_INIT_ARGS"] == wanted
