"""Scores on disk: written as they are made, found again by what decides them, read back for analysis.

They lie under a folder named by a digest of all that decides them besides the controllers: model, axes,
episodes, text.  In it each group of entries (a controller with what it is given) has a folder of its own,
named by the same rule, with one file per batch and set of entries, written all at once or not at all.  So
scores of different configurations cannot be mixed, and a sweep that asks for more finds what it has.
"""

import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from sol_jax.digests import digest
from sol_jax.errors import UserError
from sol_jax.evaluation.scoring import EntryScores, join
from sol_jax.files import parse_json, stamp, write_whole

VERSION = 2  # raise it when the same inputs would give other scores


class ScoreCache:
    """Files of scores under `root`; without a root nothing is kept.

    Args:
      about: all that decides scores besides the entries; anything JSON can hold.
      found_at: where the model and the text are, for whoever reads the scores later; it decides nothing.

    Raises `UserError` if the folder holds scores of something else.
    """

    def __init__(
        self, root: pathlib.Path | None, about: Mapping[str, Any], found_at: Mapping[str, str] | None = None
    ):
        about = dict(about, version=VERSION)
        self.folder = root and root / digest(about)
        if self.folder is None:
            return
        file, text = self.folder / "about.json", json.dumps(about, indent=2)
        if file.is_file() and file.read_text() != text:
            raise UserError(
                f"{self.folder} holds scores of another evaluation (see its about.json); move it away"
            )
        _write(file, text)
        _write(self.folder / "found_at.json", json.dumps(dict(found_at or {}), indent=2))

    def keep_blocks(self, tokens_NxM: np.ndarray, document_N: np.ndarray) -> None:
        """Writes the text that is scored, for whoever reads the scores later."""
        if self.folder is not None:
            _write(self.folder / "blocks.npz", _packed(tokens=tokens_NxM, document=document_N))

    def read(self, group: str, file: str, shape: tuple[int, ...]) -> EntryScores | None:
        """The scores of a file, of so many blocks, episodes, entries and steps.

        None if there are none, or damaged ones.
        """
        if self.folder is None:
            return None
        path = self.folder / group / f"{file}.npz"
        try:
            with np.load(io.BytesIO(path.read_bytes())) as found:
                scores = EntryScores(found["logp"], found["entropy"], found["action"])
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged file makes NumPy fail in many ways
            logging.warning("%s is damaged (%s); its entries are run again", path, error)
            return None
        if scores.logp_NxWxJxT.shape != shape or scores.action_NxWxJxT.shape != shape:
            logging.warning("%s is damaged (shapes); its entries are run again", path)
            return None
        if not (np.isfinite(scores.logp_NxWxJxT).all() and np.isfinite(scores.entropy_NxWxJxT).all()):
            logging.warning("%s holds a NaN or an infinity; its entries are run again", path)
            return None
        return scores

    def write(self, group: str, file: str, scores: EntryScores) -> None:
        """Keeps scores, all or nothing."""
        if self.folder is not None:
            logp, entropy, action = scores
            content = _packed(logp=logp, entropy=entropy, action=action)
            _write(self.folder / group / f"{file}.npz", content)

    def describe(self, group: str, what: Mapping[str, Any]) -> None:
        """What the files of a group are, in `entries.json` beside them."""
        if self.folder is not None:
            _write(self.folder / group / "entries.json", json.dumps(what, indent=2))


def _packed(**arrays: np.ndarray) -> bytes:
    """The arrays as an .npz file has them."""
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]  # its stubs take `allow_pickle` for any name
    return out.getvalue()


def _write(file: pathlib.Path, content: str | bytes) -> None:
    try:
        write_whole(file, content)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {(error.strerror or str(error)).lower()}") from error


@dataclasses.dataclass(frozen=True)
class CachedScores:
    """A folder of scores, read back: the text, and by controller what was asked for and what was scored."""

    about: dict[str, Any]
    tokens_NxM: np.ndarray
    document_N: np.ndarray
    # By controller and axis held dense.
    groups: dict[tuple[str, str], tuple[list[tuple[float, ...]], EntryScores]]
    found_at: dict[str, str] = dataclasses.field(default_factory=dict)


def read_folder(folder: pathlib.Path) -> CachedScores:
    """What `ScoreCache` keeps in a folder, complete groups only and of equal ones the newest.

    Raises `UserError` if it is no such folder.
    """
    try:
        about = parse_json((folder / "about.json").read_text())
        found_at = parse_json((folder / "found_at.json").read_text())
        with np.load(io.BytesIO((folder / "blocks.npz").read_bytes())) as blocks:
            tokens_NxM, document_N = blocks["tokens"], blocks["document"]
        described = sorted(folder.glob("*/entries.json"), key=lambda file: stamp(file)[1])
        groups = {}
        for file in described:
            what = parse_json(file.read_text())
            scores = _read_group(file.parent, len(about["blocks"]))
            if scores is not None:
                asked = [tuple(budget) for budget in what["requested"]]
                groups[what["controller"], what["held"]] = (asked, scores)
    except Exception as error:  # each layer has its own for what is missing, short or garbled
        raise UserError(
            f"{folder} is not a whole folder of scores ({error}); name one in a .scores"
        ) from error
    return CachedScores(about, tokens_NxM, document_N, groups, found_at)


def _read_group(folder: pathlib.Path, batches: int) -> EntryScores | None:
    """All scores of a group; None if some are missing."""
    rows = []
    for b in range(batches):
        parts = []
        for file in sorted(folder.glob(f"{file_name(b, 0)[:10]}-*.npz")):
            with np.load(io.BytesIO(file.read_bytes())) as found:
                parts.append(EntryScores(found["logp"], found["entropy"], found["action"]))
        if not parts:
            return None
        rows.append(join(parts, axis=2))
    whole = len({row.logp_NxWxJxT.shape[2] for row in rows}) == 1
    return join(rows, axis=0) if whole else None


def file_name(batch: int, entry: int) -> str:
    """Of the scores of one batch, from one entry on; without its suffix."""
    return f"batch-{batch:04d}-entry-{entry:05d}"
