"""Paths and JSON that users hand in: one sentence for whatever cannot be used."""

import argparse
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from sol_jax.errors import UserError

# gs://bucket, s3://..., https://..., also as `pathlib` writes them (gs:/bucket); C:/ is a drive of Windows.
LONGEST_NAME = 255  # bytes of a file's name, on every system that we know of
_REMOTE = re.compile(r"(?:^|,)\s*[A-Za-z][\w+.-]+:/")


def is_remote(given: str | os.PathLike) -> bool:
    """Whether a path, or one of several with commas between, is a URL."""
    return bool(_REMOTE.search(os.fspath(given)))


def local_path(given: str | os.PathLike, name: str) -> pathlib.Path:
    """A path on this machine, with `~` opened.

    Raises `UserError`, naming the flag or field, for a URL, or for `~` where there is no home folder.
    """
    text = os.fspath(given)
    if is_remote(text):
        raise UserError(f"{name} is {text!r}; it must be a path on this machine: copy or mount it here")
    if "\0" in text:
        raise UserError(f"{name} is {shown(text)}, which has a null character; no path can have one")
    if max(map(len, os.fsencode(text).split(b"/"))) > LONGEST_NAME:
        raise UserError(f"{name} is {shown(text)}, which is too long for a path")
    if not text.startswith("~"):
        return pathlib.Path(text)
    opened = os.path.expanduser(text)
    if opened == text and os.path.lexists(text):  # "~draft.txt", the name of a file
        return pathlib.Path(text)
    if opened.startswith("~") or os.environ.get("HOME") == "":
        raise UserError(f"{name} is {text!r}, but there is no home folder; set HOME, or give a whole path")
    return pathlib.Path(opened)


def path_argument(text: str) -> pathlib.Path:
    """`local_path` as the `type` of an argument of argparse, which names the argument itself."""
    try:
        return local_path(text, "the path")
    except UserError as fault:
        raise argparse.ArgumentTypeError(str(fault)) from None


def shown(value: Any) -> str:
    """A value for a message: as Python writes it, but short."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


class _TwiceError(ValueError):
    """Of a JSON object with two values for one name."""


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON text says.  Raises ValueError, in plain words, if it is none or cannot be held.

    `pairs` makes objects, as `object_pairs_hook` of Python's `json`.

    Python refuses numbers of more than 4,300 digits and deep nesting in ways of their own.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except _TwiceError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as fault:
        raise ValueError(f"{fault.msg}, at line {fault.lineno}, column {fault.colno}") from None
    except UnicodeDecodeError as fault:
        raise ValueError(f"it is not UTF-8 from byte {fault.start} on") from None
    except ValueError:
        raise ValueError("a number in it has more than 4,300 digits") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; ValueError if it says one thing in two ways, of which JSON would take the last."""
    fields = dict(pairs)
    for name, value in pairs if len(fields) < len(pairs) else ():
        if value != fields[name]:
            raise _TwiceError(f"it has {shown(name)} as {shown(value)} and as {shown(fields[name])}")
    return fields


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises `UserError` if it is missing, unreadable, not an object, or contradicts itself.
    """
    try:
        value = parse_json(file.read_bytes(), _once)
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no {file.name}; a model folder needs it") from None
    except (OSError, ValueError) as fault:
        raise UserError(f"{file} is not readable JSON: {fault}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a JSON {type(value).__name__}, not an object")
    return value
