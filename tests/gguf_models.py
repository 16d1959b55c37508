"""Models of tests as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import gguf
import llama_reference as reference
import numpy as np


def tensors_of(config: dict[str, Any]) -> dict[str, np.ndarray]:
    return reference.random_tensors(config, np.random.default_rng(0))


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter: the halves of a head, which rotate together, interleaved."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, config: dict[str, Any], **fields: Any) -> Path:
    """`config`'s model as llama.cpp's converter writes it; `fields` replace, add or (None) remove some.

    A field is a metadata key ("llama." added), or (an array) a tensor.
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
        "model.layers": "blk",
    }
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
        "rope.dimension_count": config["head_dim"],
        "vocab_size": config["vocab_size"],
    }
    for name, value in tensors_of(config).items():
        for theirs, ours in names.items():
            name = name.replace(f"{theirs}.", f"{ours}.")
        if "attn_q" in name or "attn_k" in name:
            value = permute(value, heads if "attn_q" in name else kv_heads)
        values[name] = value
    _write_gguf_values(path, values | fields)
    return path


def _write_gguf_values(path: Path, values: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, values.pop("general.architecture"))
    writer.add_uint16("split.count", values.pop("split.count", 1))
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            quantised = value.dtype == np.uint8
            writer.add_tensor(name, value, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if quantised else None)
        elif isinstance(value, str):
            writer.add_string(f"llama.{name}", value)
        elif value is not None:
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"llama.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
