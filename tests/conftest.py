"""Tests in subfolders import the helpers beside this file: pytest puts a conftest's folder on the path."""

import gc
import importlib.metadata
import os
import pathlib
from collections.abc import Iterator

# Most of the time of the tests is compilation.  Set before JAX is imported, for started processes too; XLA's
# own passes over the program, which decide what is computed, stay as users have them.  The older generator of
# loops takes half as long; jaxlib 0.11 has lost its flag, and aborts on it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10."),
)

import hypothesis
import jax
import pytest

# No test depends on the clock: a machine that is busy for a moment is no fault.
hypothesis.settings.register_profile("without a clock", deadline=None)
hypothesis.settings.load_profile("without a clock")

# Tracing makes many objects, and they live: looking through them less often saves a fifth of it.
gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one test compiled, later ones of any worker and the processes that they start read from disk."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    options = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        # A bound, never reached: with one, whoever reads waits for whoever writes.
        "jax_compilation_cache_max_size": 100 * 2**30,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(scope="session", autouse=True)
def own_memory_of_digests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the tests hash is not remembered in the user's cache folder."""
    from sol_jax import digests

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "CACHE_DIR", str(tmp_path_factory.mktemp("digests")))
        yield


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps() -> Iterator[None]:
    """Compiled programs are mapped into memory, some maps each, and Linux gives a process 65,530 of them.

    XLA crashes at the next one, after a thousand tests or so, so what was compiled is dropped before.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a tiny `model` and a `corpus.jsonl`; see `tiny.config_for`."""
    import tiny

    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder / "model")
    tiny.save_corpus(folder / "corpus.jsonl")
    return folder


@pytest.fixture(scope="session")
def tiny_session(tiny_folder: pathlib.Path):
    """The opened session of the tiny config."""
    import tiny

    from sol_jax.runs.session import open_session

    return open_session(tiny.config_for(tiny_folder))
