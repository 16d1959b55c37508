"""How likely given continuations of given contexts are, while a controller picks the compute of each token.

    engine = Engine(weights, tokenizer, Decoder(rules, policy), "policy", params)
    scores = score(engine, [Continuation(context, tokens)], budget=(0.5, 0.7, 0.5))

Requests are sorted and padded to few shapes; what comes of one depends neither on the others nor on padding.
Continuations of one context share its prefill.  The protocol is in `teacher_forced`.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from sol_jax.axes.base import ActionSpace, Work
from sol_jax.baselines import schedules
from sol_jax.costs import decode_step as costs
from sol_jax.downstream.teacher_forced import GivenTokens, prefill_contexts, score_controlled, score_densely
from sol_jax.errors import UserError
from sol_jax.generation.engine import Engine, batch_bucket, length_bucket
from sol_jax.generation.episodes import Decoder
from sol_jax.models.finite import finite
from sol_jax.models.sharding import fetch, num_rows

SHORTEST_EPISODE = 4  # steps that compile at the least
CACHE_TOKENS = 16384  # cache entries of a batch at most


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Tokens to be scored, after others."""

    context: tuple[int, ...]  # at least one token
    tokens: tuple[int, ...]

    @property
    def keys(self) -> np.ndarray:
        """Keys in the reach of the step that predicts each token."""
        return len(self.context) + np.arange(len(self.tokens))


class ContinuationScore(NamedTuple):
    """What came of one continuation, token by token."""

    logp_N: np.ndarray
    greedy_N: np.ndarray  # whether the token is the most likely one
    action_N: np.ndarray  # of the step that predicted it
    controllable_N: np.ndarray  # False where that was the dense action, whatever the controller chose

    def mean_cost(self, costs_AxX: np.ndarray) -> np.ndarray:
        """Realised budget per axis."""
        return mean_cost([self], costs_AxX)


def mean_cost(scores: Sequence[ContinuationScore], costs_AxX: np.ndarray) -> np.ndarray:
    """Mean cost per axis of all controllable steps; of none, that of dense ones."""
    none = np.zeros(0, int)
    action_N = np.concatenate([none, *(score.action_N[score.controllable_N] for score in scores)])
    return costs_AxX[action_N].mean(0, dtype=np.float64) if len(action_N) else costs_AxX[-1]


def work(
    requests: Sequence[Continuation], scores: Sequence[ContinuationScore], cfg: Decoder
) -> tuple[Work, Work]:
    """Bytes read and operations of all steps, and what they would have taken densely; prefills are left out.

    An episode in which a continuation ends needs no refresh.
    """
    steps: collections.Counter[tuple[int, int]] = collections.Counter()
    refreshed: collections.Counter[int] = collections.Counter()
    for request, score in zip(requests, scores, strict=True):
        steps.update(zip(score.action_N.tolist(), request.keys.tolist(), strict=True))
        episodes = -(-len(request.tokens) // cfg.horizon) if cfg.refresh else 1
        refreshed.update((request.keys[:: cfg.horizon][: episodes - 1] - 1).tolist())
    compressed = [
        (
            costs.step_cost(cfg.space.values_AxX[action], keys, cfg.model, cfg.space.axes, cfg.policy).total,
            count,
        )
        for (action, keys), count in steps.items()
    ]
    compressed += [(costs.dense_pass(cfg.horizon, past, cfg.model), n) for past, n in refreshed.items()]
    dense = [(costs.dense_step(keys, cfg.model).total, count) for (_, keys), count in steps.items()]
    return _total(compressed), _total(dense)


def shares(spent: Work, dense: Work) -> dict[str, float]:
    """Bytes and operations as shares of the dense ones; of no work at all, those of dense decoding."""
    parts = zip(Work._fields, spent, dense, strict=True)
    return {name: part / whole if whole else 1.0 for name, part, whole in parts}


def _total(parts: Sequence[tuple[Work, int]]) -> Work:
    return Work(*(float(sum(getattr(part, name) * n for part, n in parts)) for name in Work._fields))


def truncated(context: Sequence[int], tokens: Sequence[int], max_position: int) -> Continuation:
    """A continuation whose context is cut on the left to what the model reaches."""
    if not len(context) or not len(tokens):
        raise UserError("a context or a continuation has no tokens; each needs at least one")
    if len(tokens) > max_position:
        raise UserError(
            f"a continuation has {len(tokens)} tokens, more than the model's context of {max_position}"
        )
    room = max_position + 1 - len(tokens)
    return Continuation(tuple(context)[-room:], tuple(tokens))


def plans(
    space: ActionSpace,
    controller: str,
    requests: Sequence[Continuation],
    target_X: Sequence[float],
    uncontrolled: int,
    num_draws: int = 1,
    seed: int = 0,
) -> np.ndarray:
    """Schedules for all requests at the mean costs `target_X`: actions [draws, R, steps of the longest].

    `fixed` meets the target over all steps together, `random` in every continuation; `dense` needs none.
    """
    steps = np.arange(max(len(request.tokens) for request in requests))
    may_control = np.stack(
        [
            (len(request.context) + steps > uncontrolled) & (steps < len(request.tokens))
            for request in requests
        ]
    )
    target = np.asarray(target_X, np.float64)
    if controller == "fixed":
        return schedules.fixed(space, target, may_control)[None]
    if controller == "random":
        rng = np.random.default_rng(seed)
        return schedules.random(space, target, may_control, num_draws, rng).swapaxes(0, 1)
    return schedules.dense(space, *may_control.shape)[None]


def steps_bucket(count: int, horizon: int) -> int:
    """Steps that are compiled for `count`: a power of two, or T, or T times some 2**n or 3 * 2**n."""
    if count <= horizon:
        return min(horizon, batch_bucket(max(count, SHORTEST_EPISODE)))
    episodes = -(-count // horizon)
    power = batch_bucket(episodes)
    return horizon * (power * 3 // 4 if power * 3 // 4 >= episodes else power)


class Shape(NamedTuple):
    """What of a batch decides its programs."""

    rows: int  # B
    contexts: int  # U
    prefix: int  # S
    steps: int  # N


def batches(
    requests: Sequence[Continuation], horizon: int, batch_size: int
) -> Iterator[tuple[list[int], Shape]]:
    """Batches of requests, by index: long contexts first, those of one context side by side."""
    longest: dict[tuple[int, ...], int] = {}
    for request in requests:
        longest[request.context] = max(longest.get(request.context, 0), len(request.tokens))

    def size(request: Continuation) -> tuple[int, int]:
        return length_bucket(len(request.context) - 1), steps_bucket(longest[request.context], horizon)

    def key(r: int) -> tuple:
        return (*size(requests[r]), requests[r].context)

    def shape(batch: Sequence[int]) -> Shape:
        contexts = len({requests[r].context for r in batch})
        most_S, most_N = (max(sizes) for sizes in zip(*(size(requests[r]) for r in batch), strict=True))
        return Shape(batch_bucket(len(batch)), batch_bucket(contexts), most_S, most_N)

    batch: list[int] = []
    for r in sorted(range(len(requests)), key=key, reverse=True):
        _, _, S, N = shape([*batch, r])
        if len(batch) == min(batch_size, max(1, CACHE_TOKENS // (S + N))):
            yield batch, shape(batch)
            batch = []
        batch.append(r)
    if batch:
        yield batch, shape(batch)


def _arrays(requests: Sequence[Continuation], shape: Shape) -> tuple[np.ndarray, np.ndarray, GivenTokens]:
    """The contexts but for their last tokens, their lengths, and the continuations; filled up."""
    contexts = list(dict.fromkeys(request.context for request in requests))
    tokens_UxS, length_U = (
        np.zeros((shape.contexts, shape.prefix), np.int32),
        np.zeros(shape.contexts, np.int32),
    )
    for u, context in enumerate(contexts):
        length_U[u] = len(context) - 1
        tokens_UxS[u, : length_U[u]] = context[:-1]
    index_B = np.zeros(shape.rows, np.int32)
    token_BxN, label_BxN = np.zeros((2, shape.rows, shape.steps), np.int32)
    for b, request in enumerate(requests):
        n = len(request.tokens)
        index_B[b] = contexts.index(request.context)
        token_BxN[b, :n] = (request.context[-1], *request.tokens[:-1])
        label_BxN[b, :n] = request.tokens
    return tokens_UxS, length_U, GivenTokens(index_B, token_BxN, label_BxN)


def score(
    engine: Engine,
    requests: Sequence[Continuation],
    budget: Sequence[float] = (),
    plan_RxM: np.ndarray | None = None,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda requests: None,
) -> list[ContinuationScore]:
    """Scores requests under the engine's controller.

    Args:
      budget: mean cost per axis, requested of a policy; of a schedule, if `plan_RxM` is not given.
      plan_RxM: the schedule to replay, a row per request (see `plans`).
      progress: told of requests as they are done.
    """
    if not requests:
        return []
    if engine.controller != "dense" and not engine.cfg.refresh:
        raise ValueError("forced tokens are scored with the cache refreshed; the decoder's refresh is off")
    cfg, found = engine.cfg, [ContinuationScore(*(np.zeros(0),) * 4)] * len(requests)
    if plan_RxM is None:
        (plan_RxM,) = plans(cfg.space, engine.controller, requests, budget, cfg.rules.episode.uncontrolled)
    shares = num_rows(engine.weights)
    for parts, shape in _in_parts(batches(requests, cfg.horizon, batch_size), shares):
        if (cfg, shape) not in engine.compiled:
            logging.info("bucket: %s", ", ".join(f"{name} {n}" for name, n in shape._asdict().items()))
            engine.compiled.add((cfg, shape))
        # Of each part by itself: the contexts that its rows are counted among.  Of a mesh, each row has a
        # part.
        arrays = [_arrays([requests[r] for r in part], shape) for part in parts]
        tokens_UxS, length_U, given_B = jax.tree.map(lambda *leaves: np.concatenate(leaves), *arrays)
        context_U = prefill_contexts(engine.weights, tokens_UxS, length_U, shape.prefix + shape.steps, cfg)
        if engine.controller == "dense":
            logp, greedy = fetch(score_densely(engine.weights, context_U, given_B, cfg))
            action, controllable = np.full(logp.shape, cfg.space.dense), np.zeros(logp.shape, bool)
        else:
            plan_BxN = np.full((len(parts) * shape.rows, shape.steps), cfg.space.dense, np.int32)
            width = min(shape.steps, plan_RxM.shape[1])
            for p, part in enumerate(parts):
                plan_BxN[p * shape.rows :][: len(part), :width] = plan_RxM[part, :width]
            budget_BxX = np.full((len(plan_BxN), len(cfg.space.axes)), np.asarray(budget or 1.0, np.float32))
            played = score_controlled(
                engine.weights, engine.params, context_U, given_B, budget_BxX, plan_BxN, cfg
            )
            logp, greedy, action, controllable = fetch(played)
        for p, part in enumerate(parts):
            for b, r in enumerate(part, p * shape.rows):
                n = len(requests[r].tokens)
                finite("a continuation", logp[b, :n])
                found[r] = ContinuationScore(*(x[b, :n] for x in (logp, greedy, action, controllable)))
        progress(len({r for part in parts for r in part}))
    return found


def _in_parts(
    found: Iterable[tuple[list[int], Shape]], count: int
) -> Iterator[tuple[list[list[int]], Shape]]:
    """Batches `count` at a time, of one shape that holds each of them; the last are filled up by
    repetition."""
    coming = iter(found)
    while group := list(itertools.islice(coming, count)):
        parts = [batch for batch, _ in group]
        shape = Shape(*(max(sizes) for sizes in zip(*(shape for _, shape in group), strict=True)))
        yield parts + parts[:1] * (count - len(parts)), shape
