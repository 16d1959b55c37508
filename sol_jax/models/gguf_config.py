"""GGUF metadata -> `LlamaConfig`, and the opened file that weights and tokenizer are read from."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sol_jax.errors import UserError
from sol_jax.models.config_fields import Fields, checked, head_size_of
from sol_jax.models.llama import LlamaConfig, RopeScaling, rope_frequencies


class GgufFile(NamedTuple):
    """What a GGUF file holds: metadata by key, and `gguf.gguf_reader.ReaderTensor`s by name."""

    metadata: dict[str, Any]
    tensors: dict[str, Any]


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file; tensors stay on disk until they are read.

    Raises UserError if the file is unreadable or truncated.
    """
    try:
        stamp = path.stat()
    except OSError as fault:
        raise UserError(f"{path} is not readable: {fault.strerror}") from None
    return _read_gguf(path, stamp.st_mtime_ns, stamp.st_size)


# A vocabulary takes seconds to parse, and config, weights and tokenizer each come from the same file.
@functools.lru_cache(maxsize=1)
def _read_gguf(path: Path, mtime_ns: int, size: int) -> GgufFile:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, LookupError, OSError) as fault:
        reason = f"not a GGUF file, or truncated at {size} bytes: {fault}"
        raise UserError(f"{path} cannot be read ({reason}); fetch it again") from None
    return GgufFile(metadata, {tensor.name: tensor for tensor in reader.tensors})


def gguf_config(path: Path, dtype: str) -> LlamaConfig:
    """Configuration from the metadata of a GGUF file of architecture `llama`."""
    metadata, tensors = read_gguf(path)
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: general.architecture is {architecture!r}, not 'llama'")
    if metadata.get("split.count", 1) > 1:
        raise UserError(f"{path} is one part of {metadata['split.count']}; join them with gguf-split --merge")
    fields = Fields(str(path), {k: v for k, v in metadata.items() if k.startswith("llama.")})
    heads = fields.take("llama.attention.head_count", int)
    hidden = fields.take("llama.embedding_length", int)
    head_size = fields.take("llama.attention.key_length", int, None) or head_size_of(
        fields.where, hidden, heads
    )
    fields.only("llama.attention.value_length", head_size)
    fields.only("llama.rope.dimension_count", head_size)
    fields.only("llama.rope.scaling.type", "none")
    cfg = LlamaConfig(
        vocab_size=fields.take("llama.vocab_size", int, len(metadata.get("tokenizer.ggml.tokens", ()))),
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
    fields.close()
    cfg = checked(fields.where, cfg)
    if "rope_freqs.weight" in tensors:
        scaling = _gguf_rope_scaling(path, cfg, tensors["rope_freqs.weight"])
        cfg = dataclasses.replace(cfg, rope_scaling=scaling)
    return cfg


def _shortest(value: float) -> float:
    """The shortest decimal of the same float32, so that 1e-5 reads as in config.json."""
    return float(str(np.float32(value)))


def _gguf_rope_scaling(path: Path, cfg: LlamaConfig, tensor: Any) -> RopeScaling:
    """The scaling behind `rope_freqs.weight` [d/2], which holds base over scaled frequency.

    Only `factor` can be read off the tensor; every Llama 3 so far has the three constants below, and
    the tensor tells whether this one has.
    """
    stretch = np.asarray(tensor.data, np.float32)
    scaling = RopeScaling(float(stretch.max(initial=1.0)), 1.0, 4.0, 8192)
    base, scaled = rope_frequencies(cfg), rope_frequencies(dataclasses.replace(cfg, rope_scaling=scaling))
    if stretch.shape != base.shape or not np.allclose(stretch, base / scaled, rtol=1e-5, atol=0):
        raise UserError(
            f"{path}: rope_freqs.weight is not Llama 3's frequency scaling (low_freq_factor 1, "
            "high_freq_factor 4, 8192 original positions); no other is supported in GGUF files"
        )
    return scaling
