"""Blocks of tokens for training and evaluation: prepared once, cached, read at random, resumed exactly.

    splits = prepare("wikipedia", tokenizer, block_length=S + W * T + 1)
    batches = BlockIterator(splits["train"], batch_size=8, seed=0)
    tokens_BxN, document_B = next(batches)

Where text comes from is the business of `corpus`; the TFDS builder is in `token_blocks`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sol_jax.digests import CACHE_DIR, cache_folder, digest
from sol_jax.errors import UserError
from sol_jax.files import is_remote, path_of
from sol_jax.text.documents import source_fingerprint

if TYPE_CHECKING:
    from sol_jax.text.tfds_builder import Tokenizer


class Batch(NamedTuple):
    """Blocks of consecutive tokens, and for each the index of the document that holds its last token."""

    tokens_BxN: np.ndarray
    document_B: np.ndarray


class Blocks:
    """Random access to the blocks of one split.

    Attributes:
      documents: sha256 of the text of each document of the split; `document_B` counts in this order.
      fingerprint: hex digest of everything that decides the content of the blocks, but for the token between
        documents.
      earlier_fingerprint: what it was before all settings of a tokenizer were read.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        documents: Sequence[str],
        fingerprint: str,
        earlier: str = "",
    ):
        self._records = records
        self.documents = tuple(documents)
        self.fingerprint = fingerprint
        self.earlier_fingerprint = earlier or fingerprint

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices_B: Sequence[int] | np.ndarray) -> Batch:
        """The blocks of these indices, in the order given."""
        records = [self._records[int(index)] for index in indices_B]
        tokens_BxN = np.stack([record["tokens"] for record in records])
        return Batch(tokens_BxN, np.array([record["document"] for record in records], np.int32))


def prepare(
    source: str,
    tokenizer: "Tokenizer",
    *,
    block_length: int,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
    document_start: str = "",
    cache_dir: str | None = None,
) -> dict[str, Blocks]:
    """Cuts a text source into blocks of tokens, or opens the blocks that an earlier call has cut.

    Args:
      source: "wikipedia", globs of files, or "tfds:NAME"; see `sol_jax.text.documents`.
      tokenizer: anything with `encode`, `eos_id`, `vocab_size` and `fingerprint`.
      block_length: tokens in a block; the trainer needs prefix + episodes * steps + 1.
      validation_fraction: share of the documents, one at least; 0 for no such split.
      test_fraction: likewise.  With 1 everything is test text, for evaluation on a foreign corpus.
      document_start: regular expression found in the first line of each document of a text file.
      cache_dir: where prepared blocks are kept; None is `~/.cache/sol_jax`.  Those on an object store are
        copied there, to be read.

    Returns:
      The blocks of "train", "validation" and "test"; a split without documents is absent.

    Raises:
      UserError: whatever is wrong with the source, a split shorter than a block, or a folder that cannot be
        written.
    """
    from sol_jax.text import tfds_builder as token_blocks

    if block_length < 2:
        raise UserError(f"a block needs a token to read and one to predict; block_length is {block_length}")
    cut = (block_length, float(validation_fraction), float(test_fraction), document_start)
    content = source_fingerprint(source)

    def key(of_tokenizer: str) -> str:
        parts = [content, of_tokenizer, cut, token_blocks.VERSION]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    fingerprint = key(tokenizer.fingerprint)
    earlier = key(getattr(tokenizer, "earlier_fingerprint", "") or tokenizer.fingerprint)
    config = token_blocks.TokenBlocksConfig(
        # The token between documents is no part of the fingerprint, which older runs know their text by; of
        # what a run is bound to it is (`models.identity`).
        name=digest([fingerprint, tokenizer.eos_id]),
        source=source,
        document_start=document_start,
        block_length=block_length,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        tokenizer=tokenizer,
    )
    cache = path_of(cache_dir or CACHE_DIR, "data.cache_dir")
    if is_remote(cache):
        folder = token_blocks.write_or_fetch(config, cache, cache_folder())
    else:
        folder = token_blocks.write_once(config, cache)
    opened = token_blocks.open_dataset(folder)
    return {
        split: Blocks(records, documents, fingerprint, earlier)
        for split, (records, documents) in opened.items()
    }


class BlockIterator:
    """Endless batches, shuffled anew each epoch, that can be saved and resumed at any batch.

    The order of an epoch is a function of the seed and the epoch alone.  Within an epoch no block comes
    twice; a batch takes the end of one epoch and the start of the next rather than drop blocks.  With several
    processes `take` says to all of them which blocks come next, and each reads those that it needs.
    """

    def __init__(self, blocks: Blocks, *, batch_size: int, seed: int):
        """Raises `UserError` for a batch size below 1, or a seed below 0."""
        if batch_size < 1:
            raise UserError(f"a batch of {batch_size} blocks is none; use 1 or more")
        if seed < 0:
            raise UserError(f"the seed of the data is {seed}; use 0 or more")
        self._blocks = blocks
        self._seed = seed
        self._batch_size = batch_size
        self._position = 0  # blocks that the batches have taken so far
        self._shuffled: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # the latest epoch, its order

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._blocks.read(self.take())

    def take(self) -> np.ndarray:
        """The indices of the next batch's blocks, to be given to `Blocks.read`, whole or in parts."""
        positions = range(self._position, self._position + self._batch_size)
        self._position += self._batch_size
        return np.array([self._index(position) for position in positions])

    def state(self) -> dict[str, int]:
        """What `restore` needs, in integers a checkpoint can hold: the same on every process."""
        return {
            "position": self._position,
            "seed": self._seed,
            "num_blocks": len(self._blocks),
            "fingerprint": _number(self._blocks.fingerprint),
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Continues where the iterator that gave `state` stood.  The batch size may differ.

        Raises:
          UserError: the state is of another seed or of other blocks, so it cannot be continued.
        """
        if state.get("fingerprint") == _number(self._blocks.earlier_fingerprint):
            state = {**state, "fingerprint": _number(self._blocks.fingerprint)}
        for name, value in self.state().items():
            if name not in state or (name != "position" and state[name] != value):
                raise UserError(
                    f"the saved data iterator has {name} {state.get(name)}, this one {value}; resume with the"
                    " same data, tokenizer, block length and seed"
                )
        self._position = int(state["position"])

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._blocks))
        if self._shuffled[0] != epoch:
            self._shuffled = (epoch, _permutation(len(self._blocks), self._seed, epoch))
        return int(self._shuffled[1][offset])


def _number(fingerprint: str) -> int:
    """48 bits of it: exact even as a float64."""
    return int(fingerprint[:12], 16)


def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    # NumPy keeps the bits of a bit generator the same from version to version, but not what
    # `Generator.permutation` makes of them; a resumed run must not depend on the latter.
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(length)
    return np.argsort(bits, kind="stable")


def evaluation_batches(blocks: Blocks, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """Blocks in the order of the text, without shuffling; the last batch may be smaller.

    With a limit below the number of blocks, every so many blocks one is taken, so that each document is
    represented in proportion to its length and the mean estimates that of the whole split.

    Raises:
      UserError: a batch size or a limit below 1.
    """
    count = len(blocks) if limit is None else min(limit, len(blocks))
    if batch_size < 1 or count < 1:
        raise UserError(f"evaluation needs a batch and a limit of 1 or more, not {batch_size} and {limit}")
    chosen = (2 * np.arange(count) + 1) * len(blocks) // (2 * count)  # the middles of `count` equal parts
    for start in range(0, count, batch_size):
        yield blocks.read(chosen[start : start + batch_size])
