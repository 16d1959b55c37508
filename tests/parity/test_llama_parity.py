"""Our Llama against `transformers`' in float32: every layer and the logits, and loosely in bfloat16.

`pytest tests/parity --record` also rewrites the values that `tests/models/test_llama_parity_recorded.py`
checks without torch; run it after changing the configurations or the text in `tests/llama_reference.py`.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import llama_reference as reference
import numpy as np
import pytest

from sol_jax.models import llama
from sol_jax.models.tokenizer import load_tokenizer
from sol_jax.models.weights import load_model, resolve

torch = pytest.importorskip("torch", reason="`make parity` installs torch and transformers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


class Original(NamedTuple):
    """Outputs of transformers: final-norm hidden states after 1 .. L layers, and the logits."""

    hidden_LxSxD: np.ndarray
    logits_SxV: np.ndarray


def run_original(model: Any, tokens_S: np.ndarray) -> Original:
    """One forward pass, each layer's output put through the final norm (the last one has been)."""
    with torch.no_grad():
        out = model(torch.from_numpy(tokens_S.astype(np.int64))[None], output_hidden_states=True)
        _, *inner, last = [hidden[0] for hidden in out.hidden_states]
        hidden = torch.stack([*[model.model.norm(x) for x in inner], last])
    return Original(hidden.float().numpy(), out.logits[0].float().numpy())


def build_original(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, attn_implementation="eager"))
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra
    assert set(missing) == ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    return model.eval()


def compare(folder: Path, tokens_S: np.ndarray, original: Original) -> None:
    cfg, weights = load_model(folder)
    hidden = reference.layer_outputs(weights, tokens_S, cfg, range(1, cfg.num_layers + 1))
    logits_SxV = np.asarray(llama.logits(weights, jnp.asarray(hidden[-1])))
    for depth, (ours, theirs) in enumerate(zip(hidden, original.hidden_LxSxD, strict=True), 1):
        error = reference.relative_error(ours, theirs)
        assert error < reference.TOLERANCE, f"hidden states after {depth} layers differ by {error:.1e}"
    error = reference.relative_error(logits_SxV, original.logits_SxV)
    assert error < reference.TOLERANCE, f"logits differ by {error:.1e}"


@pytest.mark.parametrize("seed", range(24))
def test_random_configs(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    config = reference.random_config(rng)
    model = build_original(config, reference.random_tensors(config, rng))
    tokens_S = rng.integers(0, config["vocab_size"], int(rng.integers(1, 200)))
    # Saved by transformers itself, half of them in many shards.
    model.save_pretrained(tmp_path, max_shard_size="4KB" if seed % 2 else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not seed % 2
    compare(tmp_path, tokens_S, run_original(model, tokens_S))


@pytest.mark.parametrize("seed", range(4))
def test_bfloat16_is_as_near_to_float32_as_the_original(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    config = reference.random_config(rng)
    tensors = reference.random_tensors(config, rng)
    tokens_S = rng.integers(0, config["vocab_size"], 64)
    model = build_original(config, tensors)
    exact = run_original(model, tokens_S).logits_SxV
    theirs = run_original(model.bfloat16(), tokens_S).logits_SxV
    cfg, weights = load_model(reference.write_folder(tmp_path, config, tensors), "bfloat16")
    hidden, _ = llama.prefill(weights, jnp.asarray(tokens_S), cfg)
    ours = np.asarray(llama.logits(weights, hidden))
    rms = lambda x: float(np.sqrt(np.mean(np.square(x))))
    assert rms(ours - exact) < 1.5 * rms(theirs - exact) < 0.5 * rms(exact)


@pytest.mark.parametrize("name", reference.tiny_configs())
def test_recorded_configs(name: str, tmp_path: Path, record: bool) -> None:
    config = reference.tiny_configs()[name]
    rng = np.random.default_rng(len(name))
    tensors = reference.random_tensors(config, rng)
    tokens_S = rng.integers(0, config["vocab_size"], 40)
    original = run_original(build_original(config, tensors), tokens_S)
    folder = reference.write_folder(tmp_path, config, tensors)
    compare(folder, tokens_S, original)
    values = {"config_json": np.array(json.dumps(config)), "tokens_S": tokens_S.astype(np.int32)}
    values |= {f"w/{key}": value for key, value in tensors.items()}
    values |= {"hidden_LxSxD": original.hidden_LxSxD, "logits_SxV": original.logits_SxV}
    check_recorded(reference.TINY_FILE, name, values, record)


@functools.cache
def original_smollm2() -> tuple[np.ndarray, Original]:
    """Tokens of the passage, and the original's outputs with weights that transformers read from the GGUF."""
    path = resolve("smollm2-135m")
    model = transformers.LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens_S = np.array(load_tokenizer(path).encode(reference.PASSAGE))
    return tokens_S, run_original(model, tokens_S)


def test_smollm2_on_real_text() -> None:
    tokens_S, original = original_smollm2()
    compare(resolve("smollm2-135m"), tokens_S, original)


def test_smollm2_recorded(record: bool) -> None:
    tokens_S, (hidden_LxSxD, logits_SxV) = original_smollm2()
    rng = np.random.default_rng(0)
    positions = np.sort(rng.choice(len(tokens_S), 8, replace=False))
    channels = np.sort(rng.choice(hidden_LxSxD.shape[-1], 48, replace=False))
    words = np.sort(rng.choice(logits_SxV.shape[-1], 256, replace=False))
    logp_SxV = torch.log_softmax(torch.from_numpy(logits_SxV), -1).numpy()
    values = {
        "tokens_S": tokens_S.astype(np.int32),
        "positions": positions,
        "channels": channels,
        "words": words,
        "hidden": hidden_LxSxD[:, positions][:, :, channels],
        "logits": logits_SxV[positions][:, words],
        "next_logp": logp_SxV[np.arange(len(tokens_S) - 1), tokens_S[1:]],
    }
    check_recorded(reference.SMOLLM2_FILE, "smollm2", values, record)


def check_recorded(file: Path, prefix: str, values: dict[str, np.ndarray], record: bool) -> None:
    """The file's values under `prefix` are these; or write them, if asked to."""
    stored = dict(np.load(file)) if file.exists() else {}
    if record:
        stored = {key: value for key, value in stored.items() if not key.startswith(f"{prefix}/")}
        np.savez_compressed(file, **stored, **{f"{prefix}/{key}": value for key, value in values.items()})
        return
    for key, value in values.items():
        recorded = stored[f"{prefix}/{key}"]
        if value.dtype.kind == "f":
            assert reference.relative_error(recorded, value) < reference.TOLERANCE, key
        else:
            assert np.array_equal(recorded, value), f"{key} changed: run pytest tests/parity --record"
