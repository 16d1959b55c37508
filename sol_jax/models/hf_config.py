"""Hugging Face `config.json` -> `LlamaConfig`."""

from pathlib import Path

from sol_jax.errors import UserError
from sol_jax.models.config_fields import Fields, checked, head_size_of, read_json
from sol_jax.models.llama import LlamaConfig, RopeScaling

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
        head_size=fields.take("head_dim", int, None) or head_size_of(fields.where, hidden, heads),
        max_position=fields.take("max_position_embeddings", int),
        rope_theta=rope_theta,
        norm_eps=fields.take("rms_norm_eps", float),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        rope_scaling=rope_scaling,
        dtype=dtype,
    )
    fields.close(_HARMLESS)
    return checked(fields.where, cfg)


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
