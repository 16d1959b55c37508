"""Golden vectors computed by the authors' own code, and how their names map to ours.

`SOL_GOLDEN_DIR` names a folder with a whole set of vectors; without it the small committed subset beside this
file is used and tests of the rest are skipped.  Other sets have the same files and keys, but other seeds and
sizes, so tests take every shape and setting from the file.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import llama_reference
import numpy as np
import pytest

from sol_jax.models.llama import LlamaConfig, Weights
from sol_jax.models.weights import load_model
from sol_jax.rl.config import PolicyConfig
from sol_jax.rl.policy import Observation, PolicySpec

Vectors = dict[str, np.ndarray]
Params = dict[str, Any]

_COMMITTED = Path(__file__).parent / "golden"

_BLOCK_NAMES = {
    "ln1": "norm_attention",
    "attn.q_proj": "query",
    "attn.k_proj": "key",
    "attn.v_proj": "value",
    "attn.o_proj": "out",
    "ln2": "norm_mlp",
    "ff.0": "up",
    "ff.2": "down",
}
_NAMES = {
    "action_emb": "action_embed",
    "obs_proj": "observation_in",
    "scalar_proj.0": "scalar_in",
    "scalar_proj.2": "scalar_norm",
    "budget_head.0": "budget_in",
    "budget_head.2": "budget_out",
    "ln_f": "norm_out",
    "pi": "head",
}


def load(name: str) -> Vectors:
    """The arrays of `name`.npz; skips the test where only the committed subset lacks the file."""
    chosen = os.environ.get("SOL_GOLDEN_DIR")
    path = (Path(chosen) if chosen else _COMMITTED) / f"{name}.npz"
    if not path.exists():
        absent(path.name)
    with np.load(path) as file:
        return dict(file)


def absent(what: str) -> NoReturn:
    """Skips a test for lack of vectors, or fails it if a whole set was promised."""
    if "SOL_GOLDEN_DIR" in os.environ:
        pytest.fail(f"SOL_GOLDEN_DIR is set, but there is no {what}")
    pytest.skip(f"the committed subset has no {what}; set SOL_GOLDEN_DIR to a folder with a whole set")


def config_of(vectors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The authors' configuration that a file was made with."""
    return json.loads(str(vectors["cfg_json"]))


def under(vectors: Mapping[str, np.ndarray], prefix: str) -> Vectors:
    """The arrays whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): array for name, array in vectors.items() if name.startswith(prefix)}


def assert_close(actual, expected, what: str, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Compares with the authors' value, which has the same shape."""
    assert np.shape(actual) == np.shape(expected), f"{what}: {np.shape(actual)} is not {np.shape(expected)}"
    np.testing.assert_allclose(
        actual, expected, rtol=rtol, atol=atol, err_msg=f"{what} departs from the authors'"
    )


def language_model(
    vectors: Mapping[str, np.ndarray], prefix: str, folder: Path
) -> tuple[LlamaConfig, Weights]:
    """The tiny language model whose weights are under `prefix`, loaded through a model folder.

    Only one file says what its weights do not tell (sizes of heads, rotary base); the others share it.
    """
    described = vectors if "config_json" in vectors else load("d1_tiny_model_actions")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **json.loads(str(described["config_json"])),
    }
    return load_model(llama_reference.write_folder(folder, config, under(vectors, prefix)))


def disturbed(weights: Weights, num_runs: int, size: float = 1e-6) -> Weights:
    """Only the norms' gains, each with a new leading axis of runs: off by `size`, but for the first run.

    Rounding reaches about this far.  Where decoding with these gains (put over the weights' own) gives
    another answer, rounding decides which.
    """

    def disturb(key: jax.Array, gain: jax.Array) -> jax.Array:
        noise = size * jax.random.normal(key, (num_runs, *gain.shape))
        return gain * (1 + noise.at[0].set(0))

    layers = {name: gain for name, gain in weights["layers"].items() if name.endswith("norm")}
    gains = {"layers": layers, "final_norm": weights["final_norm"]}
    leaves, treedef = jax.tree.flatten(gains)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(treedef, map(disturb, keys, leaves))


def with_gains(weights: Weights, gains: Weights) -> Weights:
    """`weights` with the gains of one of the runs of `disturbed`."""
    return {**weights, **gains, "layers": {**weights["layers"], **gains["layers"]}}


def policy_spec(vectors: Mapping[str, np.ndarray], prefix: str, num_heads: int) -> PolicySpec:
    """The spec of the policy whose weights are under `prefix`; only the heads cannot be read off them."""
    shape = {
        name.removeprefix(prefix): array.shape for name, array in vectors.items() if name.startswith(prefix)
    }
    hidden_size, embed_size = _llm_sizes(vectors)
    width = shape["obs_proj.weight"][0]
    return PolicySpec(
        hidden_size=hidden_size,
        token_embed_size=embed_size,
        num_actions=shape["pi.weight"][0],
        horizon=shape["pos_emb.weight"][0],
        num_axes=shape["budget_head.0.weight"][1],
        config=PolicyConfig(
            d_model=width,
            num_heads=num_heads,
            num_layers=sum(name.endswith("ln1.weight") for name in shape),
            mlp_ratio=shape["blocks.0.ff.0.weight"][0] / width,
        ),
        action_embed_size=shape["action_emb.weight"][1],
        scalar_embed_size=shape["scalar_proj.0.weight"][0],
        budget_embed_size=shape["budget_head.0.weight"][0],
    )


def observations(vectors: Mapping[str, np.ndarray], ending: str = "") -> Observation:
    """[N, T, ...] from the authors' time-major arrays, whose names all have the same `ending`."""
    names = ("h", "e", "scalars", "prev_actions")
    given = (jnp.asarray(np.swapaxes(vectors[f"{name}{ending}"], 0, 1)) for name in names)
    hidden, embed, scalars, prev_action = given
    num_axes = (scalars.shape[-1] - 2) // 2
    return Observation(
        hidden=hidden,
        embed=embed,
        progress=scalars[..., 0],
        controllable=scalars[..., 1],
        target=scalars[..., 2 : 2 + num_axes],
        gap=scalars[..., 2 + num_axes :],
        prev_action=prev_action,
        num_keys=jnp.zeros_like(prev_action),  # the authors' policy sees neither of these
        logit=jnp.zeros_like(hidden[..., 0]),
    )


def scalars_of(seen: Observation) -> jax.Array:
    """The numbers of an observation as one array in the authors' order, [..., 2 + 2X]."""
    single = jnp.stack([seen.progress, seen.controllable], -1)
    return jnp.concatenate([single, seen.target, seen.gap], -1)


def policy_params(vectors: Mapping[str, np.ndarray], prefix: str) -> Params:
    """The authors' policy weights under `prefix`, as the parameter tree of `sol_jax.rl.policy.Policy`.

    Their value head, which GRPO does not train, has no place in ours and is left out.
    """
    params: Params = {}
    for name, array in vectors.items():
        path = policy_path(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if path is None:
            continue
        *parents, leaf = path
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        # PyTorch keeps a linear layer as [out, in].
        node[leaf] = array.T if leaf == "kernel" else array
    return {"params": params}


def policy_path(name: str) -> tuple[str, ...] | None:
    """Where the authors' parameter `name` lives in our tree; None for their value head."""
    if name.startswith("v."):
        return None
    if name == "pos_emb.weight":
        return ("position",)
    module, _, kind = name.rpartition(".")
    if module.startswith("blocks."):
        _, layer, part = module.split(".", 2)
        parents: tuple[str, ...] = (f"blocks_{layer}", _BLOCK_NAMES[part])
    else:
        parents = (_NAMES[module],)
    if kind == "bias":
        return (*parents, "bias")
    if parents[-1].startswith("norm") or parents[-1] == "scalar_norm":
        return (*parents, "scale")
    return (*parents, "embedding" if module == "action_emb" else "kernel")


def _llm_sizes(vectors: Mapping[str, np.ndarray]) -> tuple[int, int]:
    names = ("h", "e") if "h" in vectors else ("h_seq", "e_seq")
    hidden_size, embed_size = (vectors[name].shape[-1] for name in names)
    return hidden_size, embed_size
