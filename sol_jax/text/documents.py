"""Text sources, their documents, and the split by document.

A source is one string:

    wikipedia                       the embedded corpus: 106 English Wikipedia articles of 2016, a dump that
                                    the package `gensim` has in its test data (CC BY-SA 3.0 / GFDL)
    books/*.txt,more/*.jsonl.gz     files by glob, several joined by commas: text or JSON lines; gs://... too
    tfds:NAME[/CONFIG][:SPLIT]      the `text` feature of a TFDS dataset, of `train` unless told otherwise

All documents of a source are held in memory.
"""

import bz2
import contextlib
import dataclasses
import glob
import gzip
import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import pathlib
import re
import sys
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sol_jax.errors import UserError
from sol_jax.files import as_os_errors, is_remote, parse_json, path_of

WIKIPEDIA = "wikipedia"
TFDS_PREFIX = "tfds:"
WIKIPEDIA_DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
JSON_SUFFIXES = (".jsonl", ".json")  # C4 and Dolma call their JSON lines .json.gz
TEXT_SUFFIXES = ("", ".txt", ".raw", ".tokens")  # "" only under .gz


@dataclasses.dataclass(frozen=True)
class Document:
    """One article, book or file; `title` serves messages only and may be empty."""

    text: str
    title: str


def read_documents(source: str, document_start: str = "") -> list[Document]:
    """All documents of a source that are not blank, in the order of the source, their text untouched.

    Args:
      source: see the head of this module.
      document_start: regular expression; a text file is cut into documents at each line it is found in
        (`^ = [^=].* = $` for WikiText).  Empty: a text file is one document.

    Raises:
      UserError: no file matches, a file cannot be read, a line of a .jsonl file has no text, TFDS has no such
        text dataset, `gensim` is not installed, or there is no text at all.
    """
    if document_start and (source == WIKIPEDIA or source.startswith(TFDS_PREFIX)):
        raise UserError(f"data.document_start cuts text files; leave it empty for data.source={source!r}")
    if source == WIKIPEDIA:
        found = _read_wikipedia()
    elif source.startswith(TFDS_PREFIX):
        found = _read_tfds(source)
    else:
        found = (document for path in _files(source) for document in _read_file(path, document_start))
    documents = [document for document in found if document.text.strip()]
    if not documents:
        raise UserError(f"data.source={source!r} holds no text; name a source with at least one document")
    return documents


def source_fingerprint(source: str) -> str:
    """Hex digest that changes when the documents of the source may have changed; nothing is parsed.

    Names and order of files do not matter, their content does.  Of a TFDS dataset the name, version, split
    and shard sizes are taken.

    Raises:
      UserError: as `read_documents`, where the source cannot be found.
    """
    if source == WIKIPEDIA:
        parts = [_digest(_wikipedia_dump().read_bytes()), importlib.metadata.version("mwparserfromhell")]
    elif source.startswith(TFDS_PREFIX):
        builder, split = _tfds_builder(source)
        info = (builder.data_path / "dataset_info.json").read_bytes()
        parts = [builder.info.full_name, split, _digest(info)]
    else:
        parts = sorted(f"{_suffix(path)} {_digest(_read_bytes(path))}" for path in _files(source))
    return _digest("\n".join(parts).encode())


def document_hashes(documents: Iterable[Document]) -> list[str]:
    """Sorted sha256 of the documents' text, each once: the identity by which splits and leaks are decided."""
    return sorted({_digest(document.text.encode()) for document in documents})


def split_documents(
    documents: Sequence[Document], validation_fraction: float, test_fraction: float
) -> dict[str, list[Document]]:
    """Divides documents into train, validation and test, the same way whatever order they come in.

    Documents are ordered by the sha256 of their text and those of equal text counted once; the first go to
    test, the next to validation, the rest to train.  A fraction above 0 gets one document at least; a split
    without documents is left out, so `test_fraction=1` makes a test split of everything.

    Raises:
      UserError: fractions out of range, or too few documents to fill every split.
    """
    if min(validation_fraction, test_fraction) < 0 or validation_fraction + test_fraction > 1:
        raise UserError(
            "data.validation_fraction and data.test_fraction must be at least 0 and at most 1 together,"
            f" not {validation_fraction} and {test_fraction}"
        )
    by_hash = {_digest(document.text.encode()): document for document in documents}
    ordered = [by_hash[digest] for digest in sorted(by_hash)]
    held_out_fraction = validation_fraction + test_fraction
    test = max(round(test_fraction * len(ordered)), int(test_fraction > 0))
    held_out = max(round(held_out_fraction * len(ordered)), test + int(validation_fraction > 0))
    if held_out + (held_out_fraction < 1) > len(ordered):
        raise UserError(
            f"{len(ordered)} different documents cannot fill every split; set data.validation_fraction or"
            " data.test_fraction to 0, use more text, or cut files into documents with data.document_start"
        )
    splits = {"train": ordered[held_out:], "validation": ordered[test:held_out], "test": ordered[:test]}
    return {name: members for name, members in splits.items() if members}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ------------------------------------------------------------------------------------------------------ files


def _files(source: str) -> list[str]:
    paths: set[str] = set()
    for pattern in _patterns(source):
        files = [path for path in _matches(pattern) if _there(path).is_file()]
        if not files:
            folder = ", which is a folder" if _there(pattern).is_dir() else ""
            raise UserError(
                f"data.source: no file matches {pattern!r}{folder}; give a glob of .txt or .jsonl files (or"
                f" .gz of them), {WIKIPEDIA!r} or '{TFDS_PREFIX}NAME'"
            )
        paths.update(files)
    return sorted(paths)


def _patterns(source: str) -> list[str]:
    """A source cut at its commas, but not at those in the names of files that are there."""
    parts, patterns = source.split(","), []
    while parts:
        joined = (n for n in range(len(parts), 1, -1) if _is_one_file(",".join(parts[:n])))
        count = next(joined, 1)
        patterns.append(str(_opened(",".join(parts[:count]).strip())))
        parts = parts[count:]
    return patterns


def _is_one_file(joined: str) -> bool:
    with contextlib.suppress(UserError, OSError):
        return not is_remote(joined) and _opened(joined.strip()).is_file()
    return False


def _opened(path: str) -> pathlib.Path:
    return path_of(path, "data.source")


def _there(path: str) -> pathlib.Path:
    """What `_matches` found, whose names mean what they say."""
    return _opened(path) if is_remote(path) else pathlib.Path(path)


def _matches(pattern: str) -> list[str]:
    """What a pattern matches; what is there under its very name is no pattern, and no folder above it is."""
    if is_remote(pattern):
        return _remote_matches(pattern)
    parts = pathlib.PurePath(pattern).parts
    for count in range(len(parts), 0, -1):
        there = os.path.join(*parts[:count])
        if os.path.lexists(there):
            return glob.glob(os.path.join(glob.escape(there), *parts[count:]), recursive=True)
    return glob.glob(pattern, recursive=True)


def _remote_matches(pattern: str) -> list[str]:
    path = _opened(pattern)
    if path.exists():
        return [pattern]
    if "**" in pattern:
        raise UserError(
            f"data.source: {pattern!r} has **, for which an object store would list everything; name folders"
        )
    fixed = [*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.split("/"))]
    rest = pattern.split("/")[len(fixed) :]
    return [str(file) for file in _opened("/".join(fixed)).glob("/".join(rest))] if rest else []


def _suffix(path: str) -> str:
    """`.jsonl` for JSON lines and `.txt` for text, compressed or not."""
    name = os.path.basename(path)
    suffix = pathlib.PurePath(name.removesuffix(".gz")).suffix
    if suffix in JSON_SUFFIXES:
        return ".jsonl"
    if suffix in TEXT_SUFFIXES and (suffix or name.endswith(".gz")):
        return ".txt"
    raise UserError(f"data.source: {path} is neither .txt nor .jsonl (nor .gz of them); rename or convert it")


def _read_bytes(path: str) -> bytes:
    try:
        with as_os_errors():
            return _there(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error


def _read_text(path: str) -> str:
    content = _read_bytes(path)
    try:
        content = gzip.decompress(content) if path.endswith(".gz") else content
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def _read_file(path: str, document_start: str) -> Iterator[Document]:
    if _suffix(path) == ".txt":
        return _cut_text(_read_text(path), document_start, path)
    if document_start:
        raise UserError(f"data.document_start cuts text files, and {path} is JSON lines; leave it empty")
    return _read_json_lines(path)


def _read_json_lines(path: str) -> Iterator[Document]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UserError(f"{place} is not JSON ({error}); put one object on each line") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{place} has no text; each line must be an object with a string field `text`")
        if not text.isascii() and re.search(r"[\ud800-\udfff]", text):
            raise UserError(f"{place} has half of a surrogate pair in its text; escape whole characters")
        yield Document(text, str(record.get("title") or place))


def _cut_text(text: str, document_start: str, path: str) -> Iterator[Document]:
    if not document_start:
        yield Document(text, path)
        return
    try:
        starts_document = re.compile(document_start).search
    except re.error as error:
        raise UserError(
            f"data.document_start={document_start!r} is no regular expression ({error})"
        ) from error
    # Not `splitlines`, which also cuts at form feeds and the like; nor a multi-line search, in which
    # [^=] would match the end of a line.
    lines = text.split("\n")
    starts = [number for number, line in enumerate(lines) if starts_document(line)]
    if not starts:
        raise UserError(f"data.document_start={document_start!r} is found in no line of {path}; correct it")
    for start, stop in zip([0, *starts], [*starts, len(lines)], strict=True):
        ending = "\n" if stop < len(lines) else ""
        yield Document("\n".join(lines[start:stop]) + ending, lines[start].strip() or path)


# -------------------------------------------------------------------------------------------------- wikipedia


def _wikipedia_dump() -> pathlib.Path:
    package = importlib.util.find_spec("gensim")  # finds the folder only: to import gensim takes scipy
    for folder in (package and package.submodule_search_locations) or []:
        if (dump := pathlib.Path(folder, WIKIPEDIA_DUMP)).is_file():
            return dump
    raise UserError(
        f"data.source={WIKIPEDIA!r} is the test data of gensim 4.4.0, which is not installed;"
        " run: pip install --no-deps gensim==4.4.0"
    )


def _read_wikipedia() -> Iterator[Document]:
    from sol_jax.text.wikipedia import article_text

    with bz2.open(_wikipedia_dump()) as dump:
        for _, page in ET.iterparse(dump):
            space = page.tag.removesuffix("page")  # "{http://www.mediawiki.org/xml/export-0.10/}"
            if page.tag != f"{space}page":
                continue
            if page.find(f"{space}redirect") is None:
                markup = page.findtext(f"{space}revision/{space}text") or ""
                yield Document(article_text(markup), page.findtext(f"{space}title") or "")
            page.clear()


# ------------------------------------------------------------------------------------------------------ TFDS


def _tfds_builder(source: str) -> tuple[Any, str]:
    """The prepared builder and the split of a source `tfds:NAME[/CONFIG][:SPLIT]`."""
    import tensorflow_datasets as tfds

    name, _, split = source.removeprefix(TFDS_PREFIX).partition(":")
    try:
        builder = tfds.builder(name)
        features = builder.info.features
        is_named = isinstance(features, tfds.features.FeaturesDict)
        if not is_named or "text" not in features or not isinstance(features["text"], tfds.features.Text):
            raise UserError(f"the TFDS dataset {name!r} has no feature `text` of type Text; choose another")
        with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to our results
            builder.download_and_prepare(file_format="array_record")
    except UserError:
        raise
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(f"TFDS knows no dataset {name!r}; `tfds.list_builders()` lists the names") from error
    except Exception as error:  # a builder is foreign code: downloads, missing packages, anything
        raise UserError(f"TFDS could not prepare {name!r}: {type(error).__name__}: {error}") from error
    return builder, split or "train"


def _read_tfds(source: str) -> Iterator[Document]:
    builder, split = _tfds_builder(source)
    try:
        records = builder.as_data_source(split)
    except Exception as error:  # no such split, or prepared in a format that is not random access
        raise UserError(f"cannot read {source!r}: {type(error).__name__}: {error}") from error
    for number, record in enumerate(records):
        yield Document(record["text"].decode(), f"{source}, record {number}")
