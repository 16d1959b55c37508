"""What the parity tests (with torch) and the recorded ones share: configurations, text, tolerance."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from sol_jax.models import llama

DATA = Path(__file__).parent / "data"
TINY_FILE, SMOLLM2_FILE = DATA / "parity_tiny.npz", DATA / "parity_smollm2.npz"

# Of the largest value; float32 noise, measured on 28 tiny models: <= 7e-6, on SmolLM2 (30 layers): 4e-6.
TOLERANCE = 2e-5

# Henry David Thoreau, "Walden" (1854).
PASSAGE = (
    "There were times when I could not afford to sacrifice the bloom of the present moment to any work, "
    "whether of the head or hands. I love a broad margin to my life. Sometimes, in a summer morning, having "
    "taken my accustomed bath, I sat in my sunny doorway from sunrise till noon, rapt in a revery, amidst "
    "the pines and hickories and sumachs, in undisturbed solitude and stillness, while the birds sing around "
    "or flitted noiseless through the house, until by the sun falling in at my west window, or the noise of "
    "some traveller's wagon on the distant highway, I was reminded of the lapse of time. I grew in those "
    "seasons like corn in the night, and they were far better than any work of the hands would have been. "
    "They were not time subtracted from my life, but so much over and above my usual allowance. I realized "
    "what the Orientals mean by contemplation and the forsaking of works. For the most part, I minded not "
    "how the hours went. The day advanced as if to light some work of mine; it was morning, and lo, now it "
    "is evening, and nothing memorable is accomplished. Instead of singing like the birds, I silently smiled "
    "at my incessant good fortune. As the sparrow had its trill, sitting on the hickory before my door, so "
    "had I my chuckle or suppressed warble which he might hear out of my nest. My days were not days of the "
    "week, bearing the stamp of any heathen deity, nor were they minced into hours and fretted by the "
    "ticking of a clock."
)

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}

# Fields of config.json: [hidden, ffn, layers, heads, kv heads, head size, vocabulary], then the rest.
_TINY: dict[str, tuple[list[int], dict[str, Any]]] = {
    "plain": ([16, 40, 2, 4, 4, 4, 64], {}),
    "gqa_tied": ([12, 29, 3, 6, 2, 6, 61], {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "mqa_llama3": ([18, 31, 2, 3, 1, 10, 53], {"rope_theta": 500.0, "rope_scaling": _LLAMA3}),
    "one_layer": ([8, 17, 1, 2, 1, 12, 67], {"rope_theta": 1e6, "max_position_embeddings": 64}),
}


def tiny_configs() -> dict[str, dict[str, Any]]:
    """Fields of config.json by name of the configuration; between them they vary every honoured field."""
    return {name: _config_json(sizes, **rest) for name, (sizes, rest) in _TINY.items()}


def random_config(rng: np.random.Generator) -> dict[str, Any]:
    """Fields of config.json, each drawn anew."""
    kv_heads, group = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    scaling = {
        "rope_type": "llama3",
        "factor": float(rng.uniform(1, 32)),
        "low_freq_factor": float(rng.uniform(0.5, 2)),
        "high_freq_factor": float(rng.uniform(2.5, 6)),
        "original_max_position_embeddings": int(rng.integers(8, 200)),
    }
    sizes = [
        kv_heads * group * int(rng.integers(2, 10)),  # transformers 5 asks for a multiple
        int(rng.integers(3, 70)),
        int(rng.integers(1, 4)),
        kv_heads * group,
        kv_heads,
        2 * int(rng.integers(1, 12)),
        int(rng.integers(20, 90)),
    ]
    return _config_json(
        sizes,
        max_position_embeddings=int(rng.integers(256, 1024)),
        rms_norm_eps=float(10 ** rng.uniform(-6, -2)),
        rope_theta=float(10 ** rng.uniform(1, 6)),
        rope_scaling=scaling if rng.random() < 0.5 else None,
        tie_word_embeddings=bool(rng.random() < 0.5),
    )


def _config_json(sizes: list[int], **rest: Any) -> dict[str, Any]:
    hidden, ffn, layers, heads, kv_heads, head_size, vocabulary = sizes
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_size,
        "vocab_size": vocabulary,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        **rest,
    }


def random_tensors(config: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Parameters by their Hugging Face names, large enough that every one of them shows in the outputs."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    d = config["head_dim"]
    rows, kv_rows = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (V, D), "model.norm": (D,)}
    for i in range(config["num_hidden_layers"]):
        layer: dict[str, tuple[int, ...]] = {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
        layer |= {f"self_attn.{name}_proj": (kv_rows, D) for name in "kv"}
        layer |= {"self_attn.q_proj": (rows, D), "self_attn.o_proj": (D, rows)}
        layer |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (V, D)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape, np.float32)
        return 1 + 0.3 * noise if len(shape) == 1 else noise * np.float32(shape[-1] ** -0.5)

    return {f"{name}.weight": draw(shape) for name, shape in shapes.items()}


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A model folder as transformers would save it, in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def layer_outputs(
    weights: llama.Weights, tokens_S: np.ndarray, cfg: llama.LlamaConfig, depths: Iterable[int]
) -> np.ndarray:
    """Final-norm hidden states [depths, S, D] of the model cut after each number of layers."""

    def cut(depth: int) -> np.ndarray:
        layers = jax.tree.map(lambda stacked: stacked[:depth], weights["layers"])
        shallow = dataclasses.replace(cfg, num_layers=depth)
        prefill = jax.jit(llama.prefill, static_argnames="cfg")
        return np.asarray(prefill({**weights, "layers": layers}, jnp.asarray(tokens_S), cfg=shallow)[0])

    return np.stack([cut(depth) for depth in depths])


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))
