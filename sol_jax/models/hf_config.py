"""Hugging Face `config.json` -> `LlamaConfig`."""

from pathlib import Path

from absl import logging

from sol_jax.errors import UserError
from sol_jax.files import read_json
from sol_jax.models.config_fields import Fields, checked, head_size_of
from sol_jax.models.llama import LlamaConfig, RopeScaling

# Fields of config.json that do not change what a frozen model computes: notes of programs, tokens that the
# tokenizer's and the generation's own files name, lengths that are advice, and how to draw or to train.
# fmt: off
_HARMLESS = frozenset((
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_commit_hash", "_flash_attn_2_enabled", "_from_model_config", "_name_or_path", "attention_dropout",
    "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "cls_token_id", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "dtype", "early_stopping", "embd_pdrop", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "hidden_dropout", "id2label", "initializer_range", "is_decoder", "label2id",
    "length_penalty", "max_length", "max_seq_len", "max_seq_length", "max_sequence_length", "min_length",
    "model_max_length", "neftune_noise_alpha", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
    "prefix", "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty",
    "resid_pdrop", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
))
# Parts of other architectures: honoured where they are switched off.
_OFF = (
    "add_cross_attention", "attention_bias", "is_encoder_decoder", "mlp_bias", "rope_interleaved",
    "tie_encoder_decoder", "use_sliding_window",
)
# fmt: on


def folder_config(folder: Path, dtype: str) -> LlamaConfig:
    """Configuration from `folder`/config.json, of transformers 4 or 5."""
    values = read_json(folder / "config.json")
    fields = Fields(str(folder / "config.json"), values)
    if fields.take("model_type", str) != "llama":
        raise UserError(f"{fields.where}: model_type is {values['model_type']!r}, not 'llama'")
    fields.only("architectures", ["LlamaForCausalLM"])
    fields.only("hidden_act", "silu", "swish")  # two names of one function
    fields.only("is_llama_config", True)
    fields.only("partial_rotary_factor", 1)
    fields.only("pruned_heads", {})
    for name in _OFF:
        fields.only(name, False)
    if fields.take("auto_map", dict, None):
        logging.warning("%s: auto_map names a program, which is not run; the model is Llama's", fields.where)
    heads, layers = fields.take("num_attention_heads", int), fields.take("num_hidden_layers", int)
    fields.each("layer_types", "full_attention")
    hidden = fields.take("hidden_size", int)
    rope_theta, rope_scaling = _folder_rope(fields)
    cfg = LlamaConfig(
        vocab_size=fields.take("vocab_size", int),
        hidden_size=hidden,
        ffn_size=fields.take("intermediate_size", int),
        num_layers=layers,
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
    if None not in (old, new) and old != {name: value for name, value in new.items() if name != "rope_theta"}:
        raise UserError(f"{fields.where} has both rope_scaling and rope_parameters; keep one of them")
    rope = Fields(f"{fields.where}, {'rope_parameters' if new else 'rope_scaling'}", new or old or {})
    inner_theta = rope.take("rope_theta", float, theta)
    if theta is not None and inner_theta != theta:
        raise UserError(f"{fields.where}: rope_theta is {theta} here and {inner_theta} in rope_parameters")
    before = rope.take("type", str, None)  # the name of `rope_type` before transformers 4.43
    kind = rope.take("rope_type", str, before or "default")
    if before not in (None, kind):
        raise UserError(f"{rope.where}: rope_type is {kind!r} and type is {before!r}; keep the right one")
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
    elif kind in ("linear", "dynamic") and rope.take("factor", float, None) != 1:
        raise UserError(f"{rope.where}: rope_type is {kind!r}, which is supported with a factor of 1 only")
    elif kind not in ("default", "linear", "dynamic"):
        raise UserError(f"{rope.where}: rope_type is {kind!r}, but only 'default' or 'llama3' is supported")
    rope.only("factor", 1)
    rope.close()
    return inner_theta or 10000.0, scaling  # transformers' default: Llama 1 and 2 carry no base
