"""GGUF metadata -> `LlamaConfig`."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from sol_jax.errors import UserError
from sol_jax.models.config_fields import Fields, checked, head_size_of
from sol_jax.models.gguf_file import GgufTensor, read_gguf
from sol_jax.models.llama import LlamaConfig, RopeScaling, rope_frequencies


def gguf_config(path: Path, dtype: str) -> LlamaConfig:
    """Configuration from the metadata of a GGUF file of architecture `llama`."""
    metadata, tensors = read_gguf(path)
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: general.architecture is {architecture!r}, not 'llama'")
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise UserError(f"{path} is one part of {parts}; join them with gguf-split --merge")
    unused = {"llama.expert_count": 0, "llama.expert_used_count": 0}.items()
    given = {key: x for key, x in metadata.items() if key.startswith("llama.") and (key, x) not in unused}
    fields = Fields(str(path), given)
    heads = fields.take("llama.attention.head_count", int)
    hidden = fields.take("llama.embedding_length", int)
    head_size = fields.take("llama.attention.key_length", int, None) or head_size_of(
        fields.where, hidden, heads
    )
    fields.only("llama.attention.value_length", head_size)
    fields.only("llama.rope.dimension_count", head_size)
    # By a factor of 1, for which llama.cpp also takes 0, nothing is scaled, whatever else is said of it.
    fields.only("llama.rope.scaling.type", "none", "linear")
    fields.only("llama.rope.scaling.factor", 0, 1)
    fields.only("llama.tensor_data_layout", "Meta AI original pth")  # the order that GGUF has anyway
    cfg = LlamaConfig(
        vocab_size=fields.take("llama.vocab_size", int, None) or _vocab_size(path, metadata),
        hidden_size=hidden,
        ffn_size=fields.take("llama.feed_forward_length", int),
        num_layers=fields.take("llama.block_count", int),
        num_heads=heads,
        num_kv_heads=fields.take("llama.attention.head_count_kv", int, heads),
        head_size=head_size,
        max_position=fields.take("llama.context_length", int),
        rope_theta=_shortest(fields.take("llama.rope.freq_base", float, 10000.0)),
        norm_eps=_shortest(fields.take("llama.attention.layer_norm_rms_epsilon", float)),
        tie_embeddings="output.weight" not in tensors,
        dtype=dtype,
    )
    fields.close(("llama.rope.scaling.finetuned", "llama.rope.scaling.original_context_length"))
    cfg = checked(fields.where, cfg)
    if "rope_freqs.weight" in tensors:
        scaling = _gguf_rope_scaling(path, cfg, tensors["rope_freqs.weight"])
        cfg = dataclasses.replace(cfg, rope_scaling=scaling)
    return cfg


def _vocab_size(path: Path, metadata: dict[str, Any]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"{path} has no field tokenizer.ggml.tokens, a list of the vocabulary")
    return len(tokens)


def _shortest(value: float) -> float:
    """The shortest decimal of the same float32, so that 1e-5 reads as in config.json."""
    return float(str(np.float32(value)))


def _gguf_rope_scaling(path: Path, cfg: LlamaConfig, tensor: GgufTensor) -> RopeScaling:
    """The scaling behind `rope_freqs.weight` [d/2], which holds base over scaled frequency.

    Only `factor` can be read off the tensor; every Llama 3 so far has the three constants below, and
    the tensor tells whether this one has.
    """
    stretch = tensor.read()
    scaling = RopeScaling(float(stretch.max(initial=1.0)), 1.0, 4.0, 8192)
    base, scaled = rope_frequencies(cfg), rope_frequencies(dataclasses.replace(cfg, rope_scaling=scaling))
    if stretch.shape != base.shape or not np.allclose(stretch, base / scaled, rtol=1e-5, atol=0):
        raise UserError(
            f"{path}: rope_freqs.weight is not Llama 3's frequency scaling (low_freq_factor 1, "
            "high_freq_factor 4, 8192 original positions); no other is supported in GGUF files"
        )
    return scaling
