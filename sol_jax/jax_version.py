"""Whether the installed JAX is one that this was tried with; a newer one may lack what is used here."""

import importlib.metadata
import re

NEWEST = (0, 12)


def newer_jax(version: str) -> str:
    """What is to be said where jax is newer than any that was tried; empty where it is not."""
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if found <= NEWEST:
        return ""
    newest, next_one = ".".join(map(str, NEWEST)), f"{NEWEST[0]}.{NEWEST[1] + 1}"
    return (
        f"jax {version} is newer than any that this was tried with ({newest}): if something fails, "
        f"pip install 'jax<{next_one}'"
    )


def installed() -> str:
    """The version of the installed jax, which is not imported for it; empty if there is none."""
    try:
        return importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        return ""
