"""The TFDS builder that turns a text source into blocks of tokens, and what writes and opens its dataset.

`sol_jax.text.blocks.prepare` is the way in.  TensorFlow is not needed.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from sol_jax.copies import fetch, send
from sol_jax.errors import UserError
from sol_jax.files import as_os_errors
from sol_jax.notices import notice
from sol_jax.text.documents import Document, document_hashes, read_documents, split_documents

# Part of the cache's key: raise it when the cleaning, the splitting or the cutting of text changes.
VERSION = "1.0.0"
LAST = "dataset_info.json"  # sent last to an object store, so that what has it is whole


class Tokenizer(Protocol):
    """What blocks need of a tokenizer; `fingerprint` is a digest of all that decides ids."""

    @property
    def eos_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...


@dataclasses.dataclass(eq=False)
class TokenBlocksConfig(tfds.core.BuilderConfig):
    """The arguments of `sol_jax.text.blocks.prepare`; `name` is the digest that names the folder."""

    source: str = ""
    document_start: str = ""
    block_length: int = 0
    validation_fraction: float = 0.0
    test_fraction: float = 0.0
    tokenizer: Tokenizer | None = dataclasses.field(default=None, repr=False)


class TokenBlocks(tfds.core.GeneratorBasedBuilder):
    """Consecutive blocks of tokens, with the index of the document that holds each block's last token.

    `metadata["documents"]` holds, by split, the sha256 of the documents' text in the order of that index.
    """

    VERSION = tfds.core.Version(VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Blocks of consecutive tokens of a text corpus, split by document.",
            features=tfds.features.FeaturesDict(
                {
                    "tokens": tfds.features.Tensor(shape=(self.builder_config.block_length,), dtype=np.int32),
                    "document": tfds.features.Scalar(dtype=np.int32),
                }
            ),
            metadata=tfds.core.MetadataDict(documents={}),
            disable_shuffling=True,  # neighbours in the text stay neighbours; BlockIterator shuffles
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # the corpus module fetches what is not on disk
        config = self.builder_config
        documents = read_documents(config.source, config.document_start)
        splits = split_documents(documents, config.validation_fraction, config.test_fraction)
        examples = {}
        for split, members in splits.items():
            tokens_BxN, document_B = cut_blocks(members, config.tokenizer, config.block_length, split)
            self.info.metadata["documents"][split] = document_hashes(members)
            examples[split] = self._generate_examples(tokens_BxN, document_B)
        return examples

    def _generate_examples(
        self, tokens_BxN: np.ndarray, document_B: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (tokens_N, document) in enumerate(zip(tokens_BxN, document_B, strict=True)):
            yield index, {"tokens": tokens_N, "document": document}


def cut_blocks(
    documents: Sequence[Document], tokenizer: Tokenizer, block_length: int, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Joins the documents' tokens, an EOS after each, and cuts consecutive blocks that do not overlap.

    Args:
      documents: those of one split, in the order in which they are joined.
      tokenizer: see `Tokenizer`.
      block_length: tokens in a block, N; what is left at the end is dropped.
      split: its name, for messages.

    Returns:
      tokens_BxN, int32, and document_B, int32: the index of the document that holds each block's last token.

    Raises:
      UserError: fewer tokens than one block, or an id outside the vocabulary.
    """
    pieces = [_encode(document, tokenizer) for document in documents]
    stream_N = np.concatenate(pieces)
    B = len(stream_N) // block_length
    if B == 0:
        raise UserError(
            f"the {split} split has {len(stream_N)} tokens in {len(documents)} documents, less than one block"
            f" of {block_length}; use more text, give this split a larger share, or shorten the prefix"
        )
    ends = np.cumsum([len(piece) for piece in pieces])
    last_B = np.arange(1, B + 1) * block_length - 1
    document_B = np.searchsorted(ends, last_B, side="right").astype(np.int32)
    return stream_N[: B * block_length].reshape(B, block_length), document_B


def _encode(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    ids_N = np.array([*tokenizer.encode(document.text), tokenizer.eos_id], np.int64)
    outside_N = ids_N[(ids_N < 0) | (ids_N >= tokenizer.vocab_size)]
    if outside_N.size:
        raise UserError(
            f"the tokenizer gives id {outside_N[0]} in document {document.title!r}, outside its vocabulary of"
            f" {tokenizer.vocab_size}; use the tokenizer file that belongs to the model"
        )
    return ids_N.astype(np.int32)


def write_once(config: TokenBlocksConfig, cache_dir: pathlib.Path) -> pathlib.Path:
    """The folder of the dataset of `config`, which is written first where it is missing.

    TFDS writes to a folder of another name and renames it, so what has the right name is whole.

    Raises:
      UserError: from the source or the cutting, or because `cache_dir` cannot be written or is full.
    """
    folder = cache_dir / TokenBlocks.name / config.name / VERSION
    if folder.exists():
        return folder
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Said aloud: a large corpus takes minutes, once.
        notice(f"cutting {config.source} into blocks of {config.block_length} tokens")
        with _quiet_tfds():
            TokenBlocks(config=config, data_dir=cache_dir).download_and_prepare(file_format="array_record")
    except (OSError, RuntimeError) as error:
        if folder.exists():  # another process was faster and has written the same
            return folder
        if isinstance(error, RuntimeError) and "write() failed" not in str(error):  # so array_record puts it
            raise
        raise UserError(
            f"cannot write blocks under data.cache_dir={cache_dir} ({error}); free some space or name another"
            " folder"
        ) from error
    return folder


def write_or_fetch(config: TokenBlocksConfig, remote: pathlib.Path, local: pathlib.Path) -> pathlib.Path:
    """As `write_once` for a `cache_dir` on an object store, with the folder `local` between.

    array_record reads and writes files of this machine alone.  What another host has cut is copied here; else
    it is cut here and copied there.

    Raises:
      UserError: as `write_once`, or because either copy fails.
    """
    part = pathlib.PurePosixPath(TokenBlocks.name, config.name, VERSION)
    there, folder = remote / part, local / part
    try:
        with as_os_errors():
            is_there = (there / LAST).exists()
            files = list(there.iterdir()) if is_there and not folder.exists() else []
        if files:
            return fetch(files, folder, "data.cache_dir")
        folder = write_once(config, local)
        if not is_there:
            send(folder, there, LAST)
    except OSError as error:
        raise UserError(f"cannot write blocks under data.cache_dir={remote} ({error})") from error
    return folder


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """TFDS prints and draws bars on stdout, which belongs to our results, and logs a page each time."""
    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        tfds.enable_progress_bar()


def open_dataset(folder: pathlib.Path) -> dict[str, tuple[Sequence[Any], list[str]]]:
    """By split, the records and the sha256 of the documents of a dataset that `write_once` wrote.

    Raises:
      UserError: a file is missing or was cut short.
    """
    try:
        with _quiet_tfds():
            builder = tfds.builder_from_directory(folder)
            documents = json.loads((folder / "metadata.json").read_text())["documents"]
            splits = {name: (builder.as_data_source(name), documents[name]) for name in documents}
        for records, _ in splits.values():
            records[len(records) - 1]  # a file cut short is found here, not in the middle of a run
    except Exception as error:  # each layer has its own for what is missing, short or garbled
        raise UserError(
            f"the prepared blocks in {folder} are damaged ({error}); delete the folder"
        ) from error
    return splits
