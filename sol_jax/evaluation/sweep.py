"""Runs the entries of an evaluation batch by batch; what is scored is on disk, so a killed sweep goes on."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sol_jax import hosts
from sol_jax.axes.kappa import Quest
from sol_jax.digests import array_digest, digest
from sol_jax.errors import UserError
from sol_jax.evaluation.score_cache import ScoreCache, file_name
from sol_jax.evaluation.scoring import POLICY, BatchScorer, ControllerSpec, EntryScores, join
from sol_jax.evaluation.stale_prefill import leftover_rows, stale_prefill
from sol_jax.models.llama import Weights
from sol_jax.rl.setup import Setup
from sol_jax.text.blocks import Batch

ENTRIES_PER_FILE = 256  # of one file: some minutes' work on a CPU


@dataclasses.dataclass(frozen=True, eq=False)
class EntryGroup:
    """EntryGroup of one controller, for all N blocks: what `BatchScorer.play` takes."""

    label: str  # of the controller, for people
    given_NxWxJxY: np.ndarray
    controller: ControllerSpec
    requested: tuple[tuple[float, ...], ...] = ()  # budget of each entry, for readers of the files

    @functools.cached_property
    def given_digest(self) -> str:
        return array_digest(self.given_NxWxJxY)

    @property
    def starts(self) -> range:
        """First entry of each file."""
        return range(0, self.given_NxWxJxY.shape[2], ENTRIES_PER_FILE)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A frozen model, a policy and the blocks that all entries run on.

    `num_parallel` entries are run at a time; with `stale` the authors' fault is put in (see `stale_prefill`).
    """

    weights: Weights
    params: Any
    batches: Sequence[Batch]
    setup: Setup
    store: ScoreCache
    num_parallel: int
    stale: bool = False

    def __post_init__(self) -> None:
        if self.stale and self._kappa is None:
            raise UserError("a stale prefill needs the quest rule: config.axes.kappa.rule must be quest")
        if self.stale and self.setup.episode.episodes_per_prefix > 1:
            raise UserError("a stale prefill needs config.episode.episodes_per_prefix = 1")

    @property
    def _kappa(self) -> int | None:
        axes = self.setup.space.axes
        return next((x for x, axis in enumerate(axes) if isinstance(axis, Quest)), None)

    def count(self, groups: Sequence[EntryGroup]) -> tuple[int, int]:
        """Entries times batches of some groups: all, and those whose scores are there."""
        total = done = 0
        for group in groups:
            name, J = self._folder(group), group.given_NxWxJxY.shape[2]
            for b, batch in enumerate(self.batches):
                for start in group.starts:
                    count = min(ENTRIES_PER_FILE, J - start)
                    found = self._stored(name, file_name(b, start), self._shape(batch, count))
                    total, done = total + count, done + count * (found is not None)
        return total, done

    def run(
        self, groups: Sequence[EntryGroup], progress: Callable[[int], None] = lambda entries: None
    ) -> list[EntryScores]:
        """The scores of every group; `progress` is told of entries as they are done."""
        parts: list[list[EntryScores]] = [[] for _ in groups]
        batch_size = len(self.batches[0].tokens_BxN)
        for group in groups:
            what = {"controller": group.label, "held": group.controller.held, "requested": group.requested}
            self.store.describe(self._folder(group), what)
        self.store.keep_blocks(*(np.concatenate(part) for part in zip(*self.batches, strict=True)))
        first = 0
        for b, batch in enumerate(self.batches):
            tokens_BxN = batch.tokens_BxN
            scorer = BatchScorer(
                self.weights, self.params, tokens_BxN, self.setup, batch_size, self.num_parallel
            )
            for group, done in zip(groups, parts, strict=True):
                given = group.given_NxWxJxY[first : first + len(tokens_BxN)]
                before = done[-1] if done else None
                done.append(self._run_batch(group, b, scorer, batch, given, before, progress))
            first += len(tokens_BxN)
        return [join(done, axis=0) for done in parts]

    def _run_batch(
        self,
        group: EntryGroup,
        b: int,
        scorer: BatchScorer,
        batch: Batch,
        given: np.ndarray,
        before: EntryScores | None,
        progress: Callable[[int], None],
    ) -> EntryScores:
        name, pieces = self._folder(group), []
        for start in group.starts:
            picked = slice(start, start + ENTRIES_PER_FILE)
            piece = given[:, :, picked]
            scores = self._stored(name, file_name(b, start), self._shape(batch, piece.shape[2]))
            if scores is None:
                if self.stale and before is not None:
                    ended = before.action_NxWxJxT[:, 0, picked, -1]
                    scores = self._play_stale(scorer, batch, piece, ended, group.controller, progress)
                else:
                    scores = scorer.play(piece, group.controller, progress=progress)
                self.store.write(name, file_name(b, start), scores)
            pieces.append(scores)
        return join(pieces, axis=2)

    def _stored(self, name: str, file: str, shape: tuple[int, ...]) -> EntryScores | None:
        """The scores of a file.  With several processes the first reads it, and tells the others."""
        arrays = hosts.tell_arrays(self.store.read(name, file, shape))
        return None if arrays is None else EntryScores(*arrays)

    def _play_stale(
        self,
        scorer: BatchScorer,
        batch: Batch,
        given: np.ndarray,
        ended_BxJ: np.ndarray,
        controller: ControllerSpec,
        progress: Callable[[int], None],
    ) -> EntryScores:
        """As `BatchScorer.play`, each entry after a prefill under the budgets it left in the batch before."""
        assert self._kappa is not None
        B, J = len(batch.tokens_BxN), given.shape[2]
        values = self.setup.space.values_AxX[ended_BxJ]
        level_BxJ = np.empty((B, J), np.float32)
        for j in range(J):
            rows = leftover_rows(values[:, j], self._kappa, B)
            level_BxJ[:, j] = values[rows, j, self._kappa]
        out: EntryScores | None = None
        for level in np.unique(level_BxJ):
            # The entries that each row runs after this prefill; rows with fewer repeat some for nothing.
            # Whole chunks, so that few shapes compile.
            most, chunk = int((level_BxJ == level).sum(1).max()), self.num_parallel
            count = min(J, -(-most // chunk) * chunk)
            mine_BxC = np.argsort(level_BxJ != level, 1, kind="stable")[:, :count]
            prefilled = stale_prefill(self.weights, level, batch.tokens_BxN[scorer.rows], self.setup)
            picked = np.take_along_axis(given, mine_BxC[:, None, :, None], 2)
            scores = scorer.play(picked, controller, prefilled)
            out = out or EntryScores(*(np.zeros((*x.shape[:2], J, x.shape[3]), x.dtype) for x in scores))
            belongs_BxC = np.take_along_axis(level_BxJ, mine_BxC, 1) == level
            for row, mine, belongs in zip(range(B), mine_BxC, belongs_BxC, strict=True):
                for target, found in zip(out, scores, strict=True):
                    target[row][:, mine[belongs]] = found[row][:, belongs]
        progress(J)
        assert out is not None
        return out

    def _shape(self, batch: Batch, entries: int) -> tuple[int, ...]:
        episode = self.setup.episode
        return (len(batch.tokens_BxN), episode.episodes_per_prefix, entries, episode.horizon)

    @functools.cached_property
    def _policy(self) -> str:
        asked = self.setup.policy.config
        restated = "-restated" if asked.restate else ""
        over = f"-over-{asked.restate_steps}" if asked.restate_steps > 1 else ""
        shares = self.setup.policy.axis_shares  # with one budget for all axes
        shared = f"-one-{digest(shares)}" if shares else ""
        return array_digest(self.params) + restated + over + shared

    def _folder(self, group: EntryGroup) -> str:
        policy = self._policy if group.controller.name == POLICY else ""
        decides = [group.controller, group.given_digest, policy]
        return "-".join(filter(None, [group.label, group.controller.held, digest(decides)]))
