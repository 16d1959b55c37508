"""Architectures of published models, as their config.json has them, so that planning downloads nothing."""

from sol_jax.models.llama import LlamaConfig, RopeScaling
from sol_jax.models.weights import EMBEDDED, load_config

_LLAMA3 = RopeScaling(32.0, 1.0, 4.0, 8192)
_8B = (128256, 4096, 14336, 32, 32, 8, 128, 131072, 5e5, 1e-5, False, RopeScaling(8.0, 1.0, 4.0, 8192))
_KNOWN = {
    EMBEDDED: (49152, 576, 1536, 30, 9, 3, 64, 8192, 1e5, 1e-5, True, None),
    "hub:meta-llama/Llama-3.2-1B": (128256, 2048, 8192, 16, 32, 8, 64, 131072, 5e5, 1e-5, True, _LLAMA3),
    "hub:meta-llama/Llama-3.2-3B": (128256, 3072, 8192, 28, 24, 8, 128, 131072, 5e5, 1e-5, True, _LLAMA3),
    "hub:meta-llama/Llama-3.1-8B-Instruct": _8B,
    "hub:deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _8B,
}


def architecture(path: str, dtype: str) -> LlamaConfig:
    """The model of a config, to compute in `dtype`; its files are read where it is none of those above.

    Raises `UserError` if there is no such model.
    """
    if path in _KNOWN:
        return LlamaConfig(*_KNOWN[path], dtype=dtype)
    return load_config(path, dtype)
