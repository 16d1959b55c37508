"""Paths and JSON that users hand in: one sentence for whatever cannot be used.

A path is a `pathlib.Path` of this machine, or, for a URL such as gs://bucket/run, an `etils.epath.Path`,
which has the same methods.  What has the same name in both is used on both; the differences stand here: what
is written all at once, and files that grow.  A folder of an object store exists only as a part of names, and
is never made.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from sol_jax.errors import UserError

LONGEST_NAME = 255  # bytes of a file's name, on every system that we know of
REWRITE_SECONDS = 10.0  # at least, between two writes of an object that grows by lines
# gs://bucket, s3://..., https://..., also as `pathlib` writes them (gs:/bucket); C:/ is a drive of Windows.
_REMOTE = re.compile(r"(?:^|,)\s*[A-Za-z][\w+.-]+:/")
_URL = re.compile(r"([A-Za-z][\w+.-]+)://[^/]+")
PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}  # what epath opens them with
A_PATH = (
    "a path on this machine, or a URL that etils.epath opens (gs://BUCKET/..., s3://BUCKET/...): "
    "copy or mount it here"
)
_reached: set[str] = set()  # buckets that have answered


def is_remote(given: str | os.PathLike) -> bool:
    """Whether a path, or one of several with commas between, is a URL."""
    return bool(_REMOTE.search(os.fspath(given)))


def all_known(given: str | os.PathLike) -> bool:
    """Whether every URL of a path, or of several with commas between, has a scheme that epath knows."""
    return all(map(_is_known, filter(is_remote, os.fspath(given).split(","))))


def _is_known(url: str) -> bool:
    found = _URL.match(url.strip())
    if found is None:  # gs:/bucket is what `pathlib` makes of a URL
        return False
    from etils import epath  # here, for it takes 0.2 s that most runs need not wait

    try:
        epath.Path(found[0])
    except KeyError:
        return False
    return True


def path_of(given: str | os.PathLike, name: str) -> pathlib.Path:
    """A path on this machine, with `~` opened; of a URL an `epath.Path`, whose bucket has answered once.

    Raises `UserError`, naming the flag or field, for a URL of a scheme that epath does not know, or one that
    cannot be reached, and as `local_path`.
    """
    text = os.fspath(given).strip()
    if not is_remote(text):
        return local_path(given, name)
    if not _is_known(text):
        raise UserError(f"{name} is {shown(text)}; it must be {A_PATH}")
    _check_text(text, name)
    from etils import epath

    path: Any = epath.Path(text)
    found = _URL.match(text)
    assert found is not None  # `_is_known` matched it
    bucket, scheme = found[0], found[1]
    if bucket not in _reached:
        _see_what_others_write(scheme)
        try:
            path.stat()
        except FileNotFoundError:
            pass
        except ImportError as error:
            package = PACKAGES.get(scheme, f"what opens {scheme}://")
            raise UserError(
                f"{name} is {text!r}, which needs a package: pip install {package} ({error})"
            ) from None
        except Exception as error:  # no credentials, no bucket, no network: each package has its own
            told = f"{type(error).__name__}: {error}"
            raise UserError(f"{name} is {text!r}, which cannot be reached ({told})") from None
        _reached.add(bucket)
    return path


def _see_what_others_write(scheme: str) -> None:
    """Listings are asked for anew each time: fsspec keeps them, and other hosts write too."""
    with contextlib.suppress(ImportError):  # epath uses TensorFlow, if fsspec is not there
        from fsspec.config import conf

        for protocol in (scheme, {"gs": "gcs"}.get(scheme, scheme)):
            conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def local_path(given: str | os.PathLike, name: str) -> pathlib.Path:
    """A path on this machine, with `~` opened, for what only files of this machine will do.

    Raises `UserError`, naming the flag or field, for a URL, or for `~` where there is no home folder.
    """
    text = os.fspath(given)
    if is_remote(text):
        raise UserError(f"{name} is {text!r}; it must be a path on this machine: copy or mount it here")
    _check_text(text, name)
    if not text.startswith("~"):
        return pathlib.Path(text)
    opened = os.path.expanduser(text)
    if opened == text and os.path.lexists(text):  # "~draft.txt", the name of a file
        return pathlib.Path(text)
    if opened.startswith("~") or os.environ.get("HOME") == "":
        raise UserError(f"{name} is {text!r}, but there is no home folder; set HOME, or give a whole path")
    return pathlib.Path(opened)


def _check_text(text: str, name: str) -> None:
    if "\0" in text:
        raise UserError(f"{name} is {shown(text)}, which has a null character; no path can have one")
    if max(map(len, os.fsencode(text).split(b"/"))) > LONGEST_NAME:
        raise UserError(f"{name} is {shown(text)}, which is too long for a path")


def path_argument(text: str) -> pathlib.Path:
    """`local_path` as the `type` of an argument of argparse, which names the argument itself."""
    return _argument(local_path, text)


def any_path_argument(text: str) -> pathlib.Path:
    """`path_of` as the `type` of an argument of argparse."""
    return _argument(path_of, text)


def _argument(opened: Callable[[str, str], pathlib.Path], text: str) -> pathlib.Path:
    try:
        return opened(text, "the path")
    except UserError as fault:
        raise argparse.ArgumentTypeError(str(fault)) from None


def write_whole(path: pathlib.Path, content: str | bytes, writer: str = "") -> None:
    """Writes a file, in a folder that is made if missing: all of it, or nothing.

    `writer` tells the unfinished files of several processes apart, where these may write at once.  Raises
    OSError.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):  # an object is there when it is whole, and not before
        with as_os_errors():
            path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}{writer}.tmp")
    unfinished.write_bytes(data)
    unfinished.replace(path)


@contextlib.contextmanager
def as_os_errors() -> Iterator[None]:
    """Turns what the packages behind epath raise, each its own, into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def stamp(path: pathlib.Path) -> tuple[int, int]:
    """Size in bytes and time of change in ns; of an object in whole seconds, 0 if its store does not say."""
    found: Any = path.stat()
    if is_remote(path):
        return found.length, found.mtime * 10**9
    return found.st_size, found.st_mtime_ns


class LineFile:
    """A text file that grows by whole lines, from those on that it has.

    On this machine a line is with the operating system at once.  Nothing can be added to an object: its lines
    are held, and it is written anew, at most every `REWRITE_SECONDS` and at `flush`.  Raises OSError.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._file: io.TextIOBase | None = None
        self._lines: list[str] = []
        self._behind, self._written = False, time.monotonic()
        if not is_remote(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
            return
        with as_os_errors():
            self._lines = [path.read_text()] if path.exists() else []

    def add(self, line: str) -> None:
        """One line, without its end."""
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()
            return
        self._lines.append(line + "\n")
        self._behind = True
        if time.monotonic() - self._written >= REWRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Until all lines are written."""
        if self._behind:
            write_whole(self._path, "".join(self._lines))
            self._behind, self._written = False, time.monotonic()

    def close(self) -> None:
        """Writes what is held, and ends the file."""
        self.flush()
        if self._file is not None:
            self._file.close()


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
