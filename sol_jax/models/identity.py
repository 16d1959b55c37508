"""Which model it is, by what its files hold: names and paths move, and files are replaced under a name."""

import dataclasses
import pathlib
from collections.abc import Mapping

from sol_jax.digests import digest, file_digest
from sol_jax.models.llama import LlamaConfig
from sol_jax.models.tokenizer import Tokenizer
from sol_jax.models.weights import weight_files

HOW = ("dtype", "kernels")  # parts of a model's config that say how it is run, and not which it is


def model_identity(path: pathlib.Path, config: LlamaConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """`weights` and `tokenizer` of a resolved model: short digests of all that decides its outputs."""
    # Not the names: a hub snapshot and a copy of it are one model.
    special = [tokenizer.bos_id, tokenizer.eos_id, sorted(tokenizer.end_ids)]
    parts = sorted(file_digest(file) for file in weight_files(path))
    if path.is_dir():
        # Not config.json as it is, in which every program that saves a model leaves its version.  Defaults
        # are left out: a field that comes later changes no digest.
        usual = {field.name: field.default for field in dataclasses.fields(config)}
        said = dataclasses.asdict(config).items()
        parts.append(digest({name: x for name, x in said if name not in HOW and x != usual[name]}))
    return {
        "weights": digest(parts),
        "tokenizer": digest([tokenizer.fingerprint, *special]),
    }


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """What of two identities differs, for people; empty if nothing, or if one does not say."""
    told = [
        f"the digest of its {name} is {theirs[name]}, and here it is {ours[name]}"
        for name in sorted({*theirs} & {*ours})
        if theirs[name] != ours[name]
    ]
    return "; ".join(told)
