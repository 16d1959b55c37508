"""A model that cannot fit is refused in one sentence before it is read.

Memory that runs out is one sentence too.
"""

import types

import jax
import numpy as np
import pytest
from small_models import llama_config

from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.models import memory
from sol_jax.models.weights import load_config, load_weights


def machine(monkeypatch, tmp_path, available, swap=0, limit=None):
    """This machine with so many KiB free, and so many bytes allowed."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {available} kB\nSwapFree: {swap} kB\n")
    (tmp_path / "limit").write_text("max\n" if limit is None else f"{limit}\n")
    monkeypatch.setattr(memory, "_HOST", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "limit", tmp_path / "none"))


def test_weights_are_counted_as_they_are_stored(tiny_folder):
    cfg = load_config(tiny_folder / "model")
    weights = load_weights(tiny_folder / "model", cfg)
    assert memory.weight_bytes(cfg) == sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    half = load_config(tiny_folder / "model", "bfloat16")
    assert memory.weight_bytes(half) * 2 == memory.weight_bytes(cfg)


def test_llama_8b_is_told_to_be_too_large(monkeypatch, tmp_path):
    """12.7 GB is what a free notebook runtime has.

    8.03 billion weights take 32.1 GB, and 16.1 in bfloat16.
    """
    machine(monkeypatch, tmp_path, available=int(12.7e9 / 1024))
    large = {"vocab_size": 128_256, "hidden_size": 4096, "ffn_size": 14_336, "num_layers": 32}
    large |= {"num_heads": 32, "num_kv_heads": 8, "head_size": 128, "tie_embeddings": False}
    with pytest.raises(UserError) as told:
        memory.check_room(tmp_path, llama_config(**large))
    assert str(told.value) == (
        f"{tmp_path}: its weights take 32.1 GB in float32, and this machine has 12.7 GB free; take bfloat16 "
        "(--dtype, or config.model.dtype), or a machine with more memory"
    )
    with pytest.raises(
        UserError, match=r"16\.1 GB in bfloat16, .* take a smaller model, or a machine with more"
    ):
        memory.check_room(tmp_path, llama_config(**large, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("given", "free"),
    [
        ({"available": 100}, 102_400),
        ({"available": 100, "swap": 10}, 112_640),
        ({"available": 100, "limit": 5000}, 5000),
        ({"available": 100, "limit": 2**62}, 102_400),
    ],
)
def test_what_is_free(monkeypatch, tmp_path, given, free):
    machine(monkeypatch, tmp_path, **given)
    assert memory.host_bytes() == free


def test_where_the_system_says_nothing_nothing_is_refused(monkeypatch, tmp_path, tiny_folder):
    monkeypatch.setattr(memory, "_HOST", tmp_path / "none")
    monkeypatch.setattr(memory, "_LIMITS", ())
    assert memory.host_bytes() is None
    memory.check_room(tmp_path, load_config(tiny_folder / "model"))


def test_loading_asks_first(monkeypatch, tmp_path, tiny_folder):
    machine(monkeypatch, tmp_path, available=1)
    with pytest.raises(UserError, match="its weights take"):
        load_weights(tiny_folder / "model", load_config(tiny_folder / "model"))


def test_an_accelerator_counts_its_own(monkeypatch, tmp_path):
    device = types.SimpleNamespace(
        platform="gpu", memory_stats=lambda: {"bytes_limit": 1000, "bytes_in_use": 400}
    )
    assert memory.device_bytes(device) == 600
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [device])
    machine(monkeypatch, tmp_path, available=1)  # of the host, through which weights pass a leaf at a time
    with pytest.raises(UserError, match=r"and its gpu has 0\.0 GB free"):
        memory.check_room(tmp_path, llama_config())
    device.memory_stats = lambda: None
    memory.check_room(tmp_path, llama_config())


def test_memory_that_runs_out_is_one_sentence(capsys):
    """As XLA tells it, by a real allocation that no machine can make, and as Python does."""

    @exits_on_user_error
    def too_much():
        jax.block_until_ready(
            jax.numpy.zeros((2**22, 2**22), np.float64 if jax.config.jax_enable_x64 else np.float32)
        )

    @exits_on_user_error
    def of_python():
        raise MemoryError

    for main in (too_much, of_python):
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            "error: memory has run out; take bfloat16, fewer schedules or blocks at a time"
        )


def test_other_faults_keep_their_traceback():
    @exits_on_user_error
    def main():
        raise RuntimeError("RESOURCE_EXHAUSTED is but a word here")

    with pytest.raises(RuntimeError):
        main()
