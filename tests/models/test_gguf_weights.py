"""GGUF files: the values of a folder, every field honoured or refused by name, damage told in a sentence."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax
import llama_reference as reference
import numpy as np
import pytest
from gguf_models import tensors_of, write_gguf

from sol_jax.errors import UserError
from sol_jax.models import llama
from sol_jax.models.weights import load_config, load_model

CONFIG = reference.tiny_configs()["plain"]


@pytest.mark.parametrize("name", reference.tiny_configs())
def test_gguf_equals_safetensors(name: str, tmp_path: Path) -> None:
    config = {**reference.tiny_configs()[name], "rope_scaling": None}
    expected = load_model(reference.write_folder(tmp_path / "folder", config, tensors_of(config)))
    cfg, weights = load_model(write_gguf(tmp_path / "model.gguf", config))
    assert cfg == expected[0]
    assert_same(weights, expected[1])


def test_gguf_quantised(tmp_path: Path) -> None:
    table = np.random.default_rng(1).standard_normal((64, 32), np.float32)
    config = {**CONFIG, "hidden_size": 32, "head_dim": 8}
    quantised = gguf.quantize(table, gguf.GGMLQuantizationType.Q8_0)
    _, weights = load_model(write_gguf(tmp_path / "q.gguf", config, **{"token_embd.weight": quantised}))
    # Q8_0 by its definition: blocks of 32, a float16 scale and 32 int8.
    blocks = quantised.reshape(-1, 34)
    values = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)
    np.testing.assert_array_equal(weights["embed"], values.reshape(64, 32))


def rope_freqs(theta: float, head_size: int, original: int = 8192) -> np.ndarray:
    """`rope_freqs.weight` as llama.cpp's converter computes it for factor 8, one frequency at a time."""
    stretch = []
    for i in range(0, head_size, 2):
        wavelength = 2 * np.pi * theta ** (i / head_size)
        if wavelength < original / 4:
            stretch.append(1.0)
        elif wavelength > original:
            stretch.append(8.0)
        else:
            smooth = (original / wavelength - 1) / 3
            stretch.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(stretch, np.float32)


def test_gguf_llama3_scaling(tmp_path: Path) -> None:
    config = {**CONFIG, "head_dim": 64, "rope_theta": 500000.0}
    tensor = rope_freqs(config["rope_theta"], 64)
    assert len(set(tensor.tolist())) > 4, "some frequencies must lie between the two regimes"
    cfg = load_config(write_gguf(tmp_path / "m.gguf", config, **{"rope_freqs.weight": tensor}))
    assert cfg.rope_scaling == llama.RopeScaling(8.0, 1.0, 4.0, 8192)
    plain = dataclasses.replace(cfg, rope_scaling=None)
    scaled = llama.rope_frequencies(plain) / tensor
    np.testing.assert_allclose(llama.rope_frequencies(cfg), scaled, rtol=1e-6)
    load_model(tmp_path / "m.gguf")
    for wrong in (rope_freqs(config["rope_theta"], 64, original=4096), tensor[:-1]):
        write_gguf(tmp_path / "m.gguf", config, **{"rope_freqs.weight": wrong})
        with pytest.raises(UserError, match=r"rope_freqs\.weight is not Llama 3's"):
            load_config(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split.count": 2}, "is one part of 2"),
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'"),
        ({"expert_count": 8}, "unknown field 'llama.expert_count'"),
        ({"rope.dimension_count": 2}, "llama.rope.dimension_count is 2, but only 4"),
        ({"attention.value_length": 6}, "llama.attention.value_length is 6, but only 4"),
        ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "llama.rope.scaling.factor is 2.0"),
        ({"tensor_data_layout": "rows"}, "llama.tensor_data_layout is 'rows'"),
        ({"block_count": None}, "no field 'llama.block_count'"),
        ({"block_count": 3}, r"lacks tensor blk\.2\.attn_norm\.weight and 8 more"),
        ({"blk.0.attn_q.bias": np.zeros(16, np.float32)}, r"blk\.0\.attn_q\.bias"),
        ({"blk.0.attn_norm.weight": np.zeros(9, np.float32)}, r"blk\.0\.attn_norm\.weight has shape \[9\]"),
        ({"blk.0.attn_norm.weight": np.zeros(16, np.int32)}, "is I32, which cannot be de-quantised"),
    ],
)
def test_gguf_mistakes(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", CONFIG, **fields)
    with pytest.raises(UserError, match=message) as fault:
        load_model(path)
    assert str(path) in str(fault.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"expert_count": 0},
        {"rope.scaling.factor": 1.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0},
        {"rope.scaling.type": "none", "rope.scaling.factor": 0.0},
        {"rope.scaling.finetuned": False, "rope.scaling.original_context_length": 2048},
        {"tensor_data_layout": "Meta AI original pth"},
    ],
)
def test_gguf_fields_that_change_nothing(fields: dict[str, Any], tmp_path: Path) -> None:
    plain = load_config(write_gguf(tmp_path / "plain.gguf", CONFIG))
    assert load_config(write_gguf(tmp_path / "m.gguf", CONFIG, **fields)) == plain


def patched(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) >= 1
    path.write_bytes(data.replace(old, new, 1))


def test_gguf_number_formats_that_are_not_known(tmp_path: Path) -> None:
    """They come with newer programs; the file is as long as it should be."""
    path = write_gguf(tmp_path / "m.gguf", CONFIG)
    name = b"blk.0.attn_norm.weight"
    described = name + (1).to_bytes(4, "little") + (16).to_bytes(8, "little")
    patched(path, described + (0).to_bytes(4, "little"), described + (99).to_bytes(4, "little"))
    with pytest.raises(
        UserError, match=r"attn_norm\.weight has the number format 99, which gguf [\d.]+ does"
    ):
        load_model(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF\x03", b"GGUF\x09", "version 9 is not supported; versions 2 and 3 are"),
        (b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03", "version 50331648 is not supported, or of another byte order"),
        (b"GGUF", b"GGML", "does not begin with GGUF"),
        (b"llama.block_count", b"llama.vocab_count", "no field 'llama.block_count'"),
        (b"blk.1.attn_q", b"blk.0.attn_q", r"tensor blk\.0\.attn_q\.weight is there twice"),
        (b"llama.context_length", b"llama.context_lengt\xff", "not a GGUF file"),
    ],
)
def test_gguf_files_that_are_not_what_they_seem(old: bytes, new: bytes, message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", CONFIG)
    patched(path, old, new)
    with pytest.raises(UserError, match=message):
        load_model(path)


def test_gguf_counts_are_compared_with_the_file(tmp_path: Path) -> None:
    """A list of 2**40 numbers costs neither time nor memory."""
    path = tmp_path / "m.gguf"
    field = (7).to_bytes(8, "little") + b"a.field" + (9).to_bytes(4, "little")
    for kind in (4, 8, 9):  # numbers, strings, lists
        many = kind.to_bytes(4, "little") + (1 << 40).to_bytes(8, "little")
        path.write_bytes(b"GGUF\3\0\0\0" + bytes(8) + (1).to_bytes(8, "little") + field + many)
        with pytest.raises(UserError, match="truncated at 55 bytes"):
            load_config(path)


def test_truncated_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", CONFIG)
    data = path.read_bytes()
    for size in (0, 3, 20, 200, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=f"truncated at {size} bytes"):
            load_model(path)


def assert_same(ours: llama.Weights, expected: llama.Weights) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
