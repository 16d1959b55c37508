"""A random Llama of two layers in a Hugging Face folder, a small corpus, and a config for both."""

import json
import pathlib

import numpy as np
import tokenizers
from ml_collections import ConfigDict
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from configs import default
from sol_jax.runs.config import RunConfig

END = "<|end|>"
VOCAB_SIZE = 260
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "seven",
    "grey",
    "birds",
    "fly",
    "over",
    "walls",
)
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float32",
}


def save_model(folder: pathlib.Path, **fields) -> pathlib.Path:
    """Writes config, weights and a byte-level tokenizer; `fields` replace those of config.json."""
    folder.mkdir(parents=True)
    config = MODEL | fields
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(config), folder / "model.safetensors")
    save_tokenizer(folder)
    return folder


def tensors(config: dict) -> dict[str, np.ndarray]:
    """Random weights under their names in the file; embeddings are large enough for peaked predictions."""
    rng = np.random.default_rng(0)
    D, F, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    H, Hkv = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (H * d, D),
        "self_attn.k_proj": (Hkv * d, D),
        "self_attn.v_proj": (Hkv * d, D),
        "self_attn.o_proj": (D, H * d),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    named = {"model.embed_tokens": 0.3 * rng.standard_normal((config["vocab_size"], D))}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in shapes.items():
            named[f"model.layers.{layer}.{name}"] = shape[1] ** -0.5 * rng.standard_normal(shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            named[f"model.layers.{layer}.{name}"] = np.ones(D)
    named["model.norm"] = np.ones(D)
    return {f"{name}.weight": value.astype(np.float32) for name, value in named.items()}


def save_tokenizer(folder: pathlib.Path, extra: int = 0) -> None:
    """Every byte is an id, then comes END and then `extra` more."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END, *(f"<|{n}|>" for n in range(extra))]
    backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))


def save_corpus(path: pathlib.Path, documents: int = 30, words: int = 60) -> pathlib.Path:
    """JSON lines of random words: a block of the smoke config is 37 bytes, a document some 270."""
    rng = np.random.default_rng(0)
    texts = (" ".join(rng.choice(WORDS, words)) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config_for(folder: pathlib.Path, **fields) -> RunConfig:
    """The smoke config on the model and corpus in `folder`; `fields` are dotted paths with their values."""
    config = RunConfig.from_dict(default.get_config("smoke").to_dict())
    values = {
        "model.path": str(folder / "model"),
        "data.source": str(folder / "corpus.jsonl"),
        "data.cache_dir": str(folder / "blocks"),
        "policy.num_heads": 2,
    }
    return config.with_fields(values | fields)


def flags_for(config: RunConfig, base: ConfigDict) -> list[str]:
    """What to put on the command line after `base` to get `config`."""
    old = RunConfig.from_dict(base.to_dict()).flat()
    return [f"--config.{name}={value}" for name, value in config.flat().items() if old[name] != value]
