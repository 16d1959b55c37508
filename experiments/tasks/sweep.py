"""The controllers of one downstream task, item by item; what is done is on disk for one that was killed."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks import item_records as item_files
from experiments.tasks import prompts as tasks
from experiments.tasks.item_records import Record
from sol_jax.axes.base import Work
from sol_jax.digests import array_digest, digest
from sol_jax.downstream import continuations
from sol_jax.downstream.continuations import Continuation, ContinuationScore
from sol_jax.generation import engine
from sol_jax.generation.engine import Engine, Output, Request
from sol_jax.generation.output_cost import dense_text_cost, text_cost

VERSION = 1  # raise it when the same inputs would give other records
CHUNK = 32  # items whose records are written at a time
NEW_TOKENS = 256  # of a free answer


class Job(NamedTuple):
    """One controller on one task."""

    controller: str
    budget: tuple[float, ...] = ()  # requested of a policy, or to be met by a schedule
    draw: int = 0  # of random schedules


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """The jobs of one task: items, longest first, and the engine of each controller."""

    task: str
    examples: Sequence[tasks.Example]
    engines: Mapping[str, Engine]
    folder: pathlib.Path  # of item files
    batch_size: int
    draws: int
    seed: int

    @functools.cached_property
    def requests(self) -> list[list[Continuation]]:
        """The choices of every item, as tokens."""
        tokenizer, reach = self.engines["dense"].tokenizer, self.engines["dense"].cfg.model.max_position
        reach -= NEW_TOKENS if tasks.TASKS[self.task].free else 0
        return [
            [tasks.encode(tokenizer, *pair, reach) for pair in example.pairs] for example in self.examples
        ]

    def file(self, job: Job) -> pathlib.Path:
        """Where a job's records lie; its name stands for all that decides them."""
        own = self.engines[job.controller]
        drawn = [self.seed, self.draws] if job.controller == "random" else []
        decides: list[Any] = [VERSION, job, drawn]
        decides += [repr(own.cfg), array_digest(own.params), array_digest(own.weights["final_norm"])]
        decides.append([dataclasses.astuple(example) for example in self.examples])
        return self.folder / f"{self.task}-{job.controller}-{digest(decides)}.jsonl"

    def found(self, job: Job) -> list[Record]:
        """The records that are there, in the order of the items."""
        by_item = {record.item: record for record in item_files.read(self.file(job))}
        return [by_item[example.name] for example in self.examples if example.name in by_item]

    def matched(self, policy: Sequence[Record]) -> list[Job]:
        """The schedules at the costs that the policy realised."""
        target = tuple(round(float(cost), 6) for cost in item_files.mean_cost(policy))
        return [Job("fixed", target), *(Job("random", target, draw) for draw in range(self.draws))]

    def run(self, job: Job, tell: Callable[[int], None]) -> list[Record]:
        """All records of a job; those that are not there are made and written, some items at a time."""
        done = {record.item for record in self.found(job)}
        left = [n for n, example in enumerate(self.examples) if example.name not in done]
        plan_NxM = self._plan(job) if left else None
        for start in range(0, len(left), CHUNK):
            chunk = left[start : start + CHUNK]
            free = tasks.TASKS[self.task].free
            records = self._write_answers(job, chunk) if free else self._score(job, chunk, plan_NxM)
            item_files.add(self.file(job), records)
            tell(len(chunk))
        return self.found(job)

    def _plan(self, job: Job) -> np.ndarray | None:
        """The schedule of all requests of all items; of a free answer, the engine makes it."""
        if job.controller not in ("fixed", "random") or tasks.TASKS[self.task].free:
            return None
        cfg, flat = self.engines[job.controller].cfg, [r for mine in self.requests for r in mine]
        count = self.draws if job.controller == "random" else 1
        drawn = continuations.plans(
            cfg.space, job.controller, flat, job.budget, cfg.rules.episode.uncontrolled, count, self.seed
        )
        return drawn[job.draw]

    def _score(self, job: Job, chunk: Sequence[int], plan_NxM: np.ndarray | None) -> list[Record]:
        own, flat = self.engines[job.controller], [r for n in chunk for r in self.requests[n]]
        first_N = np.cumsum([0, *map(len, self.requests)])
        if plan_NxM is not None:
            plan_NxM = np.concatenate([plan_NxM[first_N[n] : first_N[n + 1]] for n in chunk])
        scores = iter(continuations.score(own, flat, job.budget, plan_NxM, self.batch_size))
        records = []
        for n in chunk:
            mine = [next(scores) for _ in self.requests[n]]
            records.append(scored(self.examples[n], self.requests[n], mine, own))
        return records

    def _write_answers(self, job: Job, chunk: Sequence[int]) -> list[Record]:
        own, records = self.engines[job.controller], []
        longest = max(len(self.requests[n][0].context) for n in chunk) + NEW_TOKENS
        rows = max(1, min(self.batch_size, continuations.CACHE_TOKENS // longest))
        for start in range(0, len(chunk), rows):
            batch = chunk[start : start + rows]
            asked = [
                Request(self.requests[n][0].context, job.budget, NEW_TOKENS, tasks.STOPS, seed=job.draw)
                for n in batch
            ]
            outputs = engine.generate(own, asked)
            records += [answered(self.examples[n], out, own) for n, out in zip(batch, outputs, strict=True)]
        return records


def scored(
    example: tasks.Example, requests: Sequence[Continuation], scores: Sequence[ContinuationScore], own: Engine
) -> Record:
    """The record of an item whose choices were scored."""
    logp = [float(score.logp_N.sum(dtype=np.float64)) for score in scores]
    norm = [x / length for x, length in zip(logp, example.lengths, strict=True)] if example.lengths else None
    chosen = np.concatenate([score.action_N[score.controllable_N] for score in scores])
    return Record(
        item=example.name,
        right=int(np.argmax(logp)) == example.answer,
        right_norm=None if norm is None else int(np.argmax(norm)) == example.answer,
        logp=tuple(logp),
        tokens=len(requests[example.answer].tokens),
        answer=example.answer,
        cost=tuple(own.cfg.space.costs_AxX[chosen].sum(0, dtype=np.float64).tolist()),
        steps=len(chosen),
        **_works(*continuations.work(requests, scores, own.cfg)),
    )


def answered(example: tasks.Example, output: Output, own: Engine) -> Record:
    """The record of an item to which an answer was written."""
    action_N, _, controllable_N = output.steps()
    chosen = action_N[controllable_N.astype(bool)]
    return Record(
        item=example.name,
        right=tasks.is_right(output.transcript.text, example),
        right_norm=None,
        logp=(),
        tokens=len(output.transcript.ids),
        answer=example.answer,
        cost=tuple(own.cfg.space.costs_AxX[chosen].sum(0, dtype=np.float64).tolist()),
        steps=len(chosen),
        **_works(text_cost(output, own.cfg).total, dense_text_cost(output, own.cfg.model).total),
        text=output.transcript.text,
    )


def _works(spent: Work, dense: Work) -> dict[str, Any]:
    return {"work": (spent.bytes, spent.flops), "dense_work": (dense.bytes, dense.flops)}
