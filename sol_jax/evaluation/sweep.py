"""Runs the columns of an evaluation batch by batch; what is scored is on disk, so a killed sweep goes on."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sol_jax.axes.kappa import Quest
from sol_jax.digests import array_digest, digest
from sol_jax.errors import UserError
from sol_jax.evaluation.score_cache import Store, file_name
from sol_jax.evaluation.scoring import POLICY, Kind, Player, Scores, join
from sol_jax.evaluation.stale_prefill import leftover_rows, stale_prefill
from sol_jax.models.llama import Weights
from sol_jax.rl.train_step import Setup
from sol_jax.text.blocks import Batch

COLUMNS = 256  # of one file: some minutes' work on a CPU


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """Columns of one kind, for all N blocks: what `Player.play` takes."""

    name: str  # of the controller, for people
    given_NxWxJxY: np.ndarray
    kind: Kind
    requested: tuple[tuple[float, ...], ...] = ()  # budget of each column, for readers of the files

    @functools.cached_property
    def given_digest(self) -> str:
        return array_digest(self.given_NxWxJxY)

    @property
    def starts(self) -> range:
        """First column of each file."""
        return range(0, self.given_NxWxJxY.shape[2], COLUMNS)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A frozen model, a policy and the blocks that all jobs run on.

    `num_parallel` columns are run at a time; with `stale` the authors' fault is put in (see `stale_prefill`).
    """

    weights: Weights
    params: Any
    batches: Sequence[Batch]
    setup: Setup
    store: Store
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

    def columns(self, jobs: Sequence[Job]) -> tuple[int, int]:
        """Columns times batches of some jobs: all, and those whose scores are there."""
        total = done = 0
        for job in jobs:
            name, J = self._folder(job), job.given_NxWxJxY.shape[2]
            for b, batch in enumerate(self.batches):
                for start in job.starts:
                    count = min(COLUMNS, J - start)
                    found = self.store.read(name, file_name(b, start), self._shape(batch, count))
                    total, done = total + count, done + count * (found is not None)
        return total, done

    def run(
        self, jobs: Sequence[Job], progress: Callable[[int], None] = lambda columns: None
    ) -> list[Scores]:
        """The scores of every job; `progress` is told of columns as they are done."""
        parts: list[list[Scores]] = [[] for _ in jobs]
        batch_size = len(self.batches[0].tokens_BxN)
        for job in jobs:
            what = {"controller": job.name, "held": job.kind.held, "requested": job.requested}
            self.store.describe(self._folder(job), what)
        self.store.keep_blocks(*(np.concatenate(part) for part in zip(*self.batches, strict=True)))
        first = 0
        for b, batch in enumerate(self.batches):
            tokens_BxN = batch.tokens_BxN
            player = Player(self.weights, self.params, tokens_BxN, self.setup, batch_size, self.num_parallel)
            for job, done in zip(jobs, parts, strict=True):
                given = job.given_NxWxJxY[first : first + len(tokens_BxN)]
                before = done[-1] if done else None
                done.append(self._run_batch(job, b, player, batch, given, before, progress))
            first += len(tokens_BxN)
        return [join(done, axis=0) for done in parts]

    def _run_batch(
        self,
        job: Job,
        b: int,
        player: Player,
        batch: Batch,
        given: np.ndarray,
        before: Scores | None,
        progress: Callable[[int], None],
    ) -> Scores:
        name, pieces = self._folder(job), []
        for start in job.starts:
            columns = slice(start, start + COLUMNS)
            piece = given[:, :, columns]
            scores = self.store.read(name, file_name(b, start), self._shape(batch, piece.shape[2]))
            if scores is None:
                if self.stale and before is not None:
                    ended = before.action_NxWxJxT[:, 0, columns, -1]
                    scores = self._play_stale(player, batch, piece, ended, job.kind, progress)
                else:
                    scores = player.play(piece, job.kind, progress=progress)
                self.store.write(name, file_name(b, start), scores)
            pieces.append(scores)
        return join(pieces, axis=2)

    def _play_stale(
        self,
        player: Player,
        batch: Batch,
        given: np.ndarray,
        ended_BxJ: np.ndarray,
        kind: Kind,
        progress: Callable[[int], None],
    ) -> Scores:
        """As `Player.play`, each column after a prefill under the budgets it left in the batch before."""
        assert self._kappa is not None
        B, J = len(batch.tokens_BxN), given.shape[2]
        values = self.setup.space.values_AxX[ended_BxJ]
        level_BxJ = np.empty((B, J), np.float32)
        for j in range(J):
            rows = leftover_rows(values[:, j], self._kappa, B)
            level_BxJ[:, j] = values[rows, j, self._kappa]
        out: Scores | None = None
        for level in np.unique(level_BxJ):
            # The columns that each row runs after this prefill; rows with fewer repeat some for nothing.
            # Whole chunks, so that few shapes compile.
            most, chunk = int((level_BxJ == level).sum(1).max()), self.num_parallel
            count = min(J, -(-most // chunk) * chunk)
            mine_BxC = np.argsort(level_BxJ != level, 1, kind="stable")[:, :count]
            prefilled = stale_prefill(self.weights, batch.tokens_BxN[player.rows], level, self.setup)
            picked = np.take_along_axis(given, mine_BxC[:, None, :, None], 2)
            scores = player.play(picked, kind, prefilled)
            out = out or Scores(*(np.zeros((*x.shape[:2], J, x.shape[3]), x.dtype) for x in scores))
            belongs_BxC = np.take_along_axis(level_BxJ, mine_BxC, 1) == level
            for row, columns, belongs in zip(range(B), mine_BxC, belongs_BxC, strict=True):
                for target, found in zip(out, scores, strict=True):
                    target[row][:, columns[belongs]] = found[row][:, belongs]
        progress(J)
        assert out is not None
        return out

    def _shape(self, batch: Batch, columns: int) -> tuple[int, ...]:
        episode = self.setup.episode
        return (len(batch.tokens_BxN), episode.episodes_per_prefix, columns, episode.horizon)

    @functools.cached_property
    def _policy(self) -> str:
        restated = "-restated" if self.setup.policy.restate else ""
        return array_digest(self.params) + restated

    def _folder(self, job: Job) -> str:
        policy = self._policy if job.kind.controller == POLICY else ""
        decides = [job.kind, job.given_digest, policy]
        return "-".join(filter(None, [job.name, job.kind.held, digest(decides)]))
