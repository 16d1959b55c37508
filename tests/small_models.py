"""Small architectures and axes that tests share; `llama_config` names what differs from the default."""

from typing import Any

from sol_jax.axes import ChannelPruning, OutputQuantization, Quest
from sol_jax.models.llama import LlamaConfig


def llama_config(**overrides: Any) -> LlamaConfig:
    """Two layers of width 16, four query heads on two key/value heads; `overrides` by name."""
    default: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "ffn_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 4,
        "max_position": 128,
        "rope_theta": 10000.0,
        "norm_eps": 1e-5,
        "tie_embeddings": True,
    }
    return LlamaConfig(**default | overrides)


# Few enough numbers to be counted by hand: D 4, F 8, two heads of 2 on one key/value head, V 10, float32.
COUNTED = llama_config(
    vocab_size=10, hidden_size=4, ffn_size=8, num_heads=2, num_kv_heads=1, head_size=2, max_position=64
)
AXES = (
    Quest((0.2, 1.0), (0.2, 1.0), 100.0, page_size=4),
    ChannelPruning((0.3, 1.0), (0.3, 1.0), 100.0),
    OutputQuantization((8.0, 16.0), (0.5, 1.0), 200.0),
)
TOP = (1.0, 1.0, 16.0)
