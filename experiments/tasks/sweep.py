"""Runs the controllers of one downstream task, item by item; what a killed run has done is on disk."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks import item_records, prompts
from experiments.tasks.item_records import ItemRecord
from sol_jax import hosts
from sol_jax.axes.base import Work
from sol_jax.digests import array_digest, digest
from sol_jax.downstream import continuations
from sol_jax.downstream.continuations import Continuation, ContinuationScore
from sol_jax.generation import engine
from sol_jax.generation.engine import Engine, Output, Request
from sol_jax.generation.output_cost import dense_text_cost, text_cost

VERSION = 2  # raise it when the same inputs would give other records
CHUNK = 32  # items whose records are written at a time
NEW_TOKENS = 256  # of a free answer


class TaskRun(NamedTuple):
    """One controller on one task."""

    controller: str
    budget: tuple[float, ...] = ()  # requested of a policy, or to be met by a schedule
    draw: int = 0  # of random schedules


@dataclasses.dataclass(frozen=True, eq=False)
class TaskSweep:
    """The runs of one task: items, longest first, and the engine of each controller."""

    task: str
    examples: Sequence[prompts.Example]
    engines: Mapping[str, Engine]
    folder: pathlib.Path  # of item files
    batch_size: int
    draws: int
    seed: int

    @functools.cached_property
    def requests(self) -> list[list[Continuation]]:
        """The choices of every item, as tokens."""
        tokenizer, reach = self.engines["dense"].tokenizer, self.engines["dense"].cfg.model.max_position
        reach -= NEW_TOKENS if prompts.TASKS[self.task].free else 0
        return [
            [prompts.encode(tokenizer, *pair, reach) for pair in example.pairs] for example in self.examples
        ]

    def file(self, task_run: TaskRun) -> pathlib.Path:
        """Where a run's records lie; its name stands for all that decides them."""
        own = self.engines[task_run.controller]
        drawn = [self.seed, self.draws] if task_run.controller == "random" else []
        decides: list[Any] = [VERSION, task_run, drawn]
        decides += [own.cfg.identity(), array_digest(own.params), own.identity]
        decides.append([dataclasses.astuple(example) for example in self.examples])
        return self.folder / f"{self.task}-{task_run.controller}-{digest(decides)}.jsonl"

    def records_on_disk(self, task_run: TaskRun) -> list[ItemRecord]:
        """The records that are there, in the order of the items."""
        by_item = {record.item: record for record in item_records.read_for_all(self.file(task_run))}
        return [by_item[example.name] for example in self.examples if example.name in by_item]

    def matched_schedules(self, policy: Sequence[ItemRecord]) -> list[TaskRun]:
        """The schedules at the costs that the policy realised."""
        target = tuple(round(float(cost), 6) for cost in item_records.mean_cost(policy))
        return [TaskRun("fixed", target), *(TaskRun("random", target, draw) for draw in range(self.draws))]

    def run(self, task_run: TaskRun, report: Callable[[int], None]) -> list[ItemRecord]:
        """All records of a run; those that are not there are made and written, some items at a time."""
        done = {record.item for record in self.records_on_disk(task_run)}
        left = [n for n, example in enumerate(self.examples) if example.name not in done]
        plan_NxM = self._plan(task_run) if left else None
        for start in range(0, len(left), CHUNK):
            chunk = left[start : start + CHUNK]
            free = prompts.TASKS[self.task].free
            records = self._write_answers(task_run, chunk) if free else self._score(task_run, chunk, plan_NxM)
            self._append(task_run, records)
            report(len(chunk))
        return self.records_on_disk(task_run)

    def _append(self, task_run: TaskRun, records: list[ItemRecord]) -> None:
        """Writes records; of several processes, the first does."""

        def write() -> None:
            if hosts.first():
                item_records.append_records(self.file(task_run), records)

        hosts.together(write)

    def _plan(self, task_run: TaskRun) -> np.ndarray | None:
        """The schedule of all requests of all items; of a free answer, the engine makes it."""
        if task_run.controller not in ("fixed", "random") or prompts.TASKS[self.task].free:
            return None
        cfg, flat = self.engines[task_run.controller].cfg, [r for mine in self.requests for r in mine]
        count = self.draws if task_run.controller == "random" else 1
        drawn = continuations.plans(
            cfg.space,
            task_run.controller,
            flat,
            task_run.budget,
            cfg.rules.episode.uncontrolled,
            count,
            self.seed,
        )
        return drawn[task_run.draw]

    def _score(
        self, task_run: TaskRun, chunk: Sequence[int], plan_NxM: np.ndarray | None
    ) -> list[ItemRecord]:
        own, flat = self.engines[task_run.controller], [r for n in chunk for r in self.requests[n]]
        first_N = np.cumsum([0, *map(len, self.requests)])
        if plan_NxM is not None:
            plan_NxM = np.concatenate([plan_NxM[first_N[n] : first_N[n + 1]] for n in chunk])
        scores = iter(continuations.score(own, flat, task_run.budget, plan_NxM, self.batch_size))
        records = []
        for n in chunk:
            mine = [next(scores) for _ in self.requests[n]]
            records.append(record_of_scores(self.examples[n], self.requests[n], mine, own))
        return records

    def _write_answers(self, task_run: TaskRun, chunk: Sequence[int]) -> list[ItemRecord]:
        own, records = self.engines[task_run.controller], []
        longest = max(len(self.requests[n][0].context) for n in chunk) + NEW_TOKENS
        rows = max(1, min(self.batch_size, continuations.CACHE_TOKENS // longest))
        for start in range(0, len(chunk), rows):
            batch = chunk[start : start + rows]
            asked = [
                Request(
                    self.requests[n][0].context,
                    task_run.budget,
                    NEW_TOKENS,
                    prompts.STOPS,
                    seed=task_run.draw,
                )
                for n in batch
            ]
            outputs = engine.generate(own, asked)
            records += [
                record_of_answer(self.examples[n], out, own) for n, out in zip(batch, outputs, strict=True)
            ]
        return records


def record_of_scores(
    example: prompts.Example,
    requests: Sequence[Continuation],
    scores: Sequence[ContinuationScore],
    own: Engine,
) -> ItemRecord:
    """The record of an item whose choices were scored."""
    logp = [float(score.logp_N.sum(dtype=np.float64)) for score in scores]
    norm = [x / length for x, length in zip(logp, example.lengths, strict=True)] if example.lengths else None
    chosen = np.concatenate([score.action_N[score.controllable_N] for score in scores])
    return ItemRecord(
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


def record_of_answer(example: prompts.Example, output: Output, own: Engine) -> ItemRecord:
    """The record of an item to which an answer was written."""
    action_N, _, controllable_N = output.steps()
    chosen = action_N[controllable_N.astype(bool)]
    return ItemRecord(
        item=example.name,
        right=prompts.is_right(output.transcript.text, example),
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
