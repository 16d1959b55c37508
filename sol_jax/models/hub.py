"""Files of the Hugging Face hub, or of its cache: `hub:OWNER/NAME`, for models and for policies.

huggingface_hub is imported where it is used: whoever has local files needs no hub.  Without a network it
gives what is in its cache.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sol_jax.errors import UserError

PREFIX = "hub:"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

# What went wrong -> what to do, by the names of the library's exceptions: their common bases, and the modules
# that they live in, change from one version to the next.  The first that fits is told.
_ADVICE = (
    ("GatedRepoError", f"it is gated: ask for access on its page, then {_LOG_IN}"),
    ("RepositoryNotFoundError", "there is no such repository, or it is private: check the name, or "
     f"{_LOG_IN}"),
    ("DisabledRepoError", "the hub has disabled it; take another one"),
    ("LocalTokenNotFoundError", f"the hub must know who you are: {_LOG_IN}"),
    ("LocalEntryNotFoundError", "it is not in the cache and the hub cannot be reached: check the network "
     "(and HF_HUB_OFFLINE), or give a local folder"),
    ("ProxyError", "the proxy cannot be used: check HTTPS_PROXY"),
    ("ConnectError", "the hub cannot be reached: check the network"),
    ("TimeoutException", "the hub does not answer in time: try again"),
    ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set: unset it, or give a local folder"),
)  # fmt: skip
_BY_STATUS = {
    401: f"the hub does not know who you are: {_LOG_IN}",
    403: "your token may not do that: take one that may write there, or another OWNER",
    429: "the hub has had too many requests: wait some minutes",
}


def is_id(name: str) -> bool:
    """Whether a text can be OWNER/NAME."""
    return bool(_ID.fullmatch(name))


def fetch(name: str, patterns: Sequence[str]) -> Path:
    """The folder that holds those files of the repository OWNER/NAME that `patterns` match.

    Downloaded, or found in the cache.  Raises `UserError`, with what to do, if it cannot be had.
    """
    hub = _library(name)
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as fault:  # the library's own have no base in common
        raise UserError(f"{PREFIX}{name} could not be fetched: {_reason(fault)}") from None


def push(folder: Path, files: Sequence[str], name: str, private: bool) -> str:
    """Uploads files of a folder to the repository OWNER/NAME, which is made if need be; returns its address.

    Raises `UserError`, with what to do, if that is not possible.
    """
    hub = _library(name)
    try:
        api = hub.HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=list(files), commit_message="A policy of sol_jax"
        )
        return str(address)
    except Exception as fault:
        raise UserError(f"{PREFIX}{name} could not be written: {_reason(fault)}") from None


def _library(name: str) -> Any:
    if not is_id(name):
        raise UserError(f"{PREFIX}{name} is no repository of the hub; write {PREFIX}OWNER/NAME")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{PREFIX}{name} needs its package: pip install huggingface_hub") from None
    return huggingface_hub


def _reason(fault: Exception) -> str:
    """What went wrong, and what to do about it."""
    kinds = {kind.__name__ for kind in type(fault).__mro__}
    status = getattr(getattr(fault, "response", None), "status_code", None)
    for kind, advice in _ADVICE:
        if kind in kinds:
            return advice
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if status is not None:
        return f"the hub answered with status {status}; try again later"
    return str(fault).strip().split("\n")[0]
