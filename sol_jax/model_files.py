"""The configuration half of a model's files: Hugging Face `config.json` and GGUF metadata -> `LlamaConfig`.

Every field is read through `Fields`, which refuses by name whatever nobody read: a setting that these
files carry and the model does not honour would otherwise change its outputs silently.
"""

import dataclasses
import functools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sol_jax.errors import UserError
from sol_jax.llama import LlamaConfig, RopeScaling, rope_frequencies

_REQUIRED: Any = object()
_KINDS = {
    int: "a positive integer",
    float: "a positive number",
    bool: "true or false",
    str: "a string",
    dict: "an object",
}

# Fields of config.json that do not change what a frozen model computes.
# fmt: off
_HARMLESS = frozenset((
    "_attn_implementation_autoset", "_name_or_path", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "id2label", "initializer_range",
    "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "problem_type",
    "return_dict", "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers.js_config", "transformers_version", "unsloth_fixed", "use_cache",
))
# fmt: on


class Fields:
    """The fields of one configuration, to be taken one by one; `close` refuses those left over."""

    def __init__(self, where: str, values: dict[str, Any]):
        self.where = where
        self._left = dict(values)

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Value of `name`, positive if `kind` is int or float; an absent or null one gives `default`.

        Raises UserError if it is absent without a default, or of another kind.
        """
        value: Any = self._left.pop(name, None)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.where} has no field {name!r}")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        # `type` and not isinstance: true is no number of layers.
        positive = not isinstance(value, int | float) or 0 < value < float("inf")
        if type(value) is not kind or (kind in (int, float) and not positive):
            raise UserError(f"{self.where}: {name} is {value!r}, not {_KINDS[kind]}")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Take a field that is honoured at some values only; absent or null counts as one of them."""
        value: Any = self._left.pop(name, None)
        if value is not None and value not in allowed:
            names = " or ".join(map(repr, allowed))
            raise UserError(f"{self.where}: {name} is {value!r}, but only {names} is supported")

    def close(self, harmless: Collection[str] = ()) -> None:
        """Refuse what is left, except `harmless` names."""
        left = sorted(set(self._left) - set(harmless))
        if left:
            raise UserError(f"{self.where}: unknown field {left[0]!r}; this model would not honour it")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.  Raises UserError if it is missing, unreadable or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; a model folder needs it") from None
    except (OSError, ValueError) as fault:
        raise UserError(f"{path} is not readable JSON: {fault}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def folder_config(folder: Path, dtype: str) -> LlamaConfig:
    """Configuration from `folder`/config.json, of transformers 4 or 5."""
    values = read_json(folder / "config.json")
    fields = Fields(str(folder / "config.json"), values)
    if fields.take("model_type", str) != "llama":
        raise UserError(f"{fields.where}: model_type is {values['model_type']!r}, not 'llama'")
    fields.only("architectures", ["LlamaForCausalLM"])
    fields.only("hidden_act", "silu")
    fields.only("pretraining_tp", 1)
    fields.only("attention_dropout", 0)
    fields.only("is_llama_config", True)
    for name in ("attention_bias", "mlp_bias", "rope_interleaved", "is_decoder", "is_encoder_decoder"):
        fields.only(name, False)
    heads = fields.take("num_attention_heads", int)
    hidden = fields.take("hidden_size", int)
    rope_theta, rope_scaling = _folder_rope(fields)
    cfg = LlamaConfig(
        vocab_size=fields.take("vocab_size", int),
        hidden_size=hidden,
        ffn_size=fields.take("intermediate_size", int),
        num_layers=fields.take("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=fields.take("num_key_value_heads", int, heads),
        head_size=fields.take("head_dim", int, None) or _divide(fields.where, hidden, heads),
        max_position=fields.take("max_position_embeddings", int),
        rope_theta=rope_theta,
        norm_eps=fields.take("rms_norm_eps", float),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        rope_scaling=rope_scaling,
        dtype=dtype,
    )
    fields.close(_HARMLESS)
    return _checked(fields.where, cfg)


def _folder_rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling: `rope_theta` and `rope_scaling`, or `rope_parameters` of transformers 5."""
    theta = fields.take("rope_theta", float, None)
    old, new = fields.take("rope_scaling", dict, None), fields.take("rope_parameters", dict, None)
    if old is not None and new is not None:
        raise UserError(f"{fields.where} has both rope_scaling and rope_parameters; keep one of them")
    rope = Fields(f"{fields.where}, {'rope_scaling' if new is None else 'rope_parameters'}", old or new or {})
    inner_theta = rope.take("rope_theta", float, theta)
    if theta is not None and inner_theta != theta:
        raise UserError(f"{fields.where}: rope_theta is {theta} here and {inner_theta} in rope_parameters")
    kind = rope.take("type", str, "default")  # the name of `rope_type` before transformers 4.43
    kind = rope.take("rope_type", str, kind)
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(
            factor=rope.take("factor", float),
            low_freq_factor=rope.take("low_freq_factor", float),
            high_freq_factor=rope.take("high_freq_factor", float),
            original_max_position=rope.take("original_max_position_embeddings", int),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise UserError(f"{rope.where}: high_freq_factor must be greater than low_freq_factor")
    elif kind != "default":
        raise UserError(f"{rope.where}: rope_type is {kind!r}, but only 'default' or 'llama3' is supported")
    rope.close()
    return inner_theta or 10000.0, scaling  # transformers' default: Llama 1 and 2 carry no base


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
    head_size = fields.take("llama.attention.key_length", int, None) or _divide(fields.where, hidden, heads)
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
    cfg = _checked(fields.where, cfg)
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


def _divide(where: str, hidden: int, heads: int) -> int:
    if hidden % heads:
        raise UserError(f"{where}: the hidden size {hidden} is not a multiple of {heads} heads")
    return hidden // heads


def _checked(where: str, cfg: LlamaConfig) -> LlamaConfig:
    """`cfg`, or UserError if its sizes contradict each other."""
    if cfg.dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {cfg.dtype!r}, but only 'float32' or 'bfloat16' is supported")
    if cfg.num_heads % cfg.num_kv_heads:
        raise UserError(f"{where}: {cfg.num_heads} heads cannot share {cfg.num_kv_heads} key/value heads")
    if cfg.head_size % 2:
        raise UserError(f"{where}: the head size {cfg.head_size} is odd; rotary embeddings need pairs")
    return cfg
