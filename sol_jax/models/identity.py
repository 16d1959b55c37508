"""Which model it is, by what its files hold: names and paths move, and files are replaced under a name."""

import pathlib
from collections.abc import Mapping

from sol_jax.digests import digest, file_digest
from sol_jax.models.tokenizer import Tokenizer

WEIGHTS = ("config.json", "*.safetensors")  # of a folder


def model_identity(path: pathlib.Path, tokenizer: Tokenizer) -> dict[str, str]:
    """`weights` and `tokenizer` of a resolved model: short digests of all that decides its outputs."""
    files = [path]
    if path.is_dir():
        files = sorted({file for pattern in WEIGHTS for file in path.glob(pattern)})
    # Not the names: a hub snapshot and a copy of it are one model.
    special = [tokenizer.bos_id, tokenizer.eos_id, sorted(tokenizer.end_ids)]
    return {
        "weights": digest(sorted(file_digest(file) for file in files)),
        "tokenizer": digest([tokenizer.fingerprint, *special]),
    }


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """What of two identities differs, for people; empty if nothing, or if one does not say."""
    told = [
        f"its {name} have the digest {theirs[name]}, and here it is {ours[name]}"
        for name in sorted({*theirs} & {*ours})
        if theirs[name] != ours[name]
    ]
    return "; ".join(told)
