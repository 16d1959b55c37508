"""Policies as files: a folder with the weights in bfloat16, the run's config, and a model card.

    save_policy(folder, params, config, about)
    params, config, about = load_policy("smollm2-135m/sol-j-fl")

Named policies are committed under `experiments/results/policies`.
"""

import contextlib
import importlib.resources
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sol_jax.errors import UserError
from sol_jax.files import parse_json, path_of, stamp, write_whole
from sol_jax.models import hub
from sol_jax.models.identity import differences
from sol_jax.rl.setup import Setup
from sol_jax.rl.train_step import init_state
from sol_jax.runs.config import RunConfig
from sol_jax.runs.policy_card import card
from sol_jax.runs.tensors import pack, unpack

POLICIES = pathlib.Path(str(importlib.resources.files("experiments"))) / "results" / "policies"
MAX_BYTES = 1_000_000  # of a policy's weights: published ones are committed, and clones stay light
# What a policy's inputs and outputs depend on; it cannot be used where one of these differs.
BOUND = r"axes\.\w+\.levels|episode\.horizon|policy\.(page_input|logit_input|predict_losses)"
PICTURE = "sample.png"  # on the card: a text that was written under the policy
FILES = ("policy.safetensors", "config.json", "README.md", PICTURE)  # of a policy's folder
HASH_LENGTH = 10  # hexadecimal digits of a document's sha256 that are kept


def save_policy(folder: pathlib.Path, params: Any, config: RunConfig, about: Mapping[str, Any]) -> None:
    """Writes `policy.safetensors`, `config.json` and the card `README.md`.

    `about` says what the policy is and what it was trained on: anything JSON can hold, and of these
    `title`, `model`, `identity`, `command`, `updates`, `seed`, `commit`, `results` and `documents` are used,
    and what `policy_card.metadata` says.

    Raises `UserError` if the weights have more than `MAX_BYTES`, or the folder cannot be written.
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    # The table of prices is small, and budgets hold as well as it does.
    narrow = {name: jnp.bfloat16 if name.startswith("params.") else jnp.float32 for name in flat}
    half = {name: jnp.asarray(leaf, narrow[name]) for name, leaf in flat.items()}
    size = sum(leaf.nbytes for leaf in half.values())
    if size > MAX_BYTES:
        raise UserError(
            f"the policy has {size / 1e6:.2f} MB, more than the {MAX_BYTES / 1e6:g} MB of a published one; "
            "train one with a lower config.policy.d_model"
        )
    with written_to(folder):
        weights = pack({name: np.asarray(leaf) for name, leaf in half.items()})
        write_whole(folder / "policy.safetensors", weights)
        describe(folder, config, about)


@contextlib.contextmanager
def written_to(folder: pathlib.Path) -> Iterator[None]:
    """Turns what goes wrong in writing a policy's files into `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: a policy cannot be written there ({error.strerror or error})") from error


def describe(folder: pathlib.Path, config: RunConfig, about: Mapping[str, Any]) -> None:
    """Writes `config.json` and the card anew, beside the weights and the picture, if there is one."""
    # Thousands of documents: on one line, that the file stays one to read.
    described = {"about": {**about, "documents": " ".join(about["documents"])}, "config": config.flat()}
    write_whole(folder / "config.json", json.dumps(described, indent=1) + "\n")
    size = stamp(folder / "policy.safetensors")[0]
    write_whole(folder / "README.md", card(config, about, size, (folder / PICTURE).is_file()))


def load_policy(name: str | pathlib.Path) -> tuple[Any, RunConfig, dict[str, Any]]:
    """Parameters (float32), config and `about` of a policy, by name, by folder or by `hub:OWNER/NAME`.

    Raises `UserError` if there is none of that name, or its files are damaged.
    """
    folder = folder_of(name)
    try:
        described = parse_json((folder / "config.json").read_text())
        config = RunConfig.from_flat(described["config"])
        about = {**described["about"], "documents": described["about"]["documents"].split()}
        about["updates"] = int(about["updates"])
        dict(about.get("identity", {}))  # which is compared with that of the model here
        flat, _ = unpack((folder / "policy.safetensors").read_bytes())
    except Exception as error:  # each layer has its own for what is missing, short or garbled
        raise UserError(f"the policy in {folder} cannot be read ({error}); restore its files") from error
    if wrong := sorted(leaf for leaf, x in flat.items() if not bool(jnp.isfinite(x).all())):
        raise UserError(f"the policy in {folder} holds a NaN or an infinity in {wrong[0]}; restore its files")
    params = traverse_util.unflatten_dict(
        {tuple(leaf.split(".")): jnp.asarray(x, jnp.float32) for leaf, x in flat.items()}
    )
    return params, config, about


def known_policies() -> list[str]:
    """The names of the committed policies."""
    return sorted(str(file.parent.relative_to(POLICIES)) for file in POLICIES.rglob("policy.safetensors"))


def folder_of(name: str | pathlib.Path) -> pathlib.Path:
    """Where the files of a policy are, fetched from the hub if need be.

    Raises `UserError` if there is none.
    """
    if str(name).startswith(hub.PREFIX):
        folder = hub.fetch(str(name).removeprefix(hub.PREFIX), FILES)
        if not (folder / "policy.safetensors").is_file():
            raise UserError(
                f"{name} is no policy: it has no policy.safetensors; if it is a model, give it as the model, "
                "and a policy that was trained for it"
            )
        return folder
    for folder in (POLICIES / name, path_of(name, "the policy")):
        if (folder / "policy.safetensors").is_file():
            return folder
    names = ", ".join(known_policies()) or "none yet"
    to_fetch = f"; write hub:{name} to fetch it from the Hugging Face hub" if hub.is_id(str(name)) else ""
    raise UserError(
        f"there is no policy {str(name)!r}; give a folder that has one, hub:OWNER/NAME, or one of: "
        f"{names}{to_fetch}"
    )


def check_fits(
    name: str,
    params: Any,
    own: RunConfig,
    about: Mapping[str, Any],
    run: RunConfig,
    setup: Setup,
    identity: Mapping[str, str],
) -> None:
    """Raises `UserError` if a policy cannot control the model and axes of `run` and `setup`.

    Args:
      own: the config that it was trained with; `about` is what its file says of it.
      identity: of the model here, which is compared with the policy's own where that is known.
    """
    theirs, ours = own.flat(), run.flat()
    known = about.get("identity", {})
    if told := differences(known, identity):
        raise UserError(f"the policy {name} is for another model than {run.model.path}: {told}")
    if not known and model_name(own) != model_name(run):
        raise UserError(f"the policy {name} is for the model {model_name(own)}, not for {model_name(run)}")
    for field in filter(re.compile(BOUND).fullmatch, sorted({*theirs, *ours})):
        its, here = theirs.get(field), ours.get(field)
        if its != here:
            raise UserError(
                f"the policy {name} has config.{field} = {its}, and here it is {here}; "
                "a policy works with its own only"
            )
    expected = jax.eval_shape(lambda: init_state(jax.random.key(0), setup).params)
    shapes = _shapes(params)
    wrong = sorted(set(shapes.items()) ^ set(_shapes(expected).items()))
    if wrong:
        leaf = wrong[0][0]
        raise UserError(
            f"the policy {name} does not fit a model of hidden size {setup.model.hidden_size} and "
            f"{setup.space.num_actions} actions: its {leaf} is {shapes.get(leaf, 'absent')}, "
            f"not {_shapes(expected).get(leaf, 'there')}"
        )


def model_name(config: RunConfig) -> str:
    """The last part of the model's path: the same for a hub id and a local copy."""
    return pathlib.PurePath(config.model.path.removeprefix("hub:")).name


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(params, sep=".").items()}


def document_names(hashes: Iterable[str]) -> list[str]:
    """Shortened document hashes, by which a policy knows its training text."""
    return sorted(digest[:HASH_LENGTH] for digest in hashes)
