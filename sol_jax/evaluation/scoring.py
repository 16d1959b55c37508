"""Scores of many schedules on the same text: after one dense prefill per batch, some at a time.

`BatchScorer` holds a batch of blocks ready; `BatchScorer.play` runs entries on it.  An *entry* is a
controller asked for one budget (or given one schedule to replay) on every episode.  `J` counts entries.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sol_jax.axes.base import Work
from sol_jax.baselines import heuristics, schedules
from sol_jax.costs import decode_step as costs
from sol_jax.models import llama
from sol_jax.models.finite import finite
from sol_jax.models.llama import Weights
from sol_jax.models.sharding import fetch, jit_by_row, num_rows
from sol_jax.rl.collect import prefill_blocks, run_schedules, score_labels
from sol_jax.rl.rollout import Controller, PrefilledBlock, policy_controller, replay
from sol_jax.rl.setup import Setup

REPLAY = "replay"
POLICY = "policy"
HEURISTICS = ("entropy", "drift", "drift_official")


class ControllerSpec(NamedTuple):
    """Who controls entries, which axis is kept dense if any, and what else is measured."""

    name: str = REPLAY  # or POLICY, or one of HEURISTICS
    held: str = ""
    with_entropy: bool = False  # of each prediction


class EntryScores(NamedTuple):
    """What J schedules of every episode did: N blocks, W episodes each."""

    logp_NxWxJxT: np.ndarray  # of the labels, nats
    entropy_NxWxJxT: np.ndarray  # of the predictions, nats; only where asked for, else an empty last axis
    action_NxWxJxT: np.ndarray  # taken: the dense one where a step may not be controlled

    def costs(self, setup: Setup) -> np.ndarray:
        """Mean cost of each axis over the controllable steps of each episode, [N, W, J, X]."""
        N, W, _, T = self.action_NxWxJxT.shape
        counted = schedules.controllable(setup.episode, N).reshape(N, W, 1, T, 1)
        cost = setup.space.costs_AxX[self.action_NxWxJxT] * counted
        return cost.sum(-2) / np.maximum(counted.sum(-2), 1)

    def step_costs(self, setup: Setup) -> np.ndarray:
        """Mean cost of each axis at each step over the episodes in which it is controllable, [J, T, X]."""
        N, W, _, T = self.action_NxWxJxT.shape
        counted = schedules.controllable(setup.episode, N).reshape(N, W, 1, T, 1)
        cost = setup.space.costs_AxX[self.action_NxWxJxT] * counted
        return cost.sum((0, 1), dtype=np.float64) / np.maximum(counted.sum((0, 1)), 1)

    def work(self, setup: Setup, with_policy: bool) -> Work:
        """Bytes read and operations of all steps together, as shares of decoding them densely.

        Of every step, controllable or not.  Text that is given has no KV refresh, so none is counted.
        """
        W, T = self.action_NxWxJxT.shape[1::2]
        policy = costs.policy_step(setup.policy) if with_policy else costs.NONE
        spent, dense = np.zeros(2), np.zeros(2)
        for w, t in np.ndindex(W, T):
            kv_len = setup.episode.prefix_len + w * T + t + 1
            count_A = np.bincount(self.action_NxWxJxT[:, w, :, t].ravel(), minlength=setup.space.num_actions)
            steps, full = count_A.sum(), costs.dense_step(kv_len, setup.model).total
            spent += np.array(costs.action_costs(setup.space, kv_len, setup.model)) @ count_A
            spent += steps * np.array(policy)
            dense += steps * np.array(full)
        return Work(*(float(share) for share in spent / dense))


def join(parts: list[EntryScores], axis: int) -> EntryScores:
    """EntryScores of several batches (axis 0) or sets of entries (axis 2) as one."""
    return EntryScores(*(np.concatenate(arrays, axis) for arrays in zip(*parts, strict=True)))


class PrefilledBatch(NamedTuple):
    """A batch of blocks after the prefill, and what heuristics start from."""

    blocks: PrefilledBlock  # leading axis B
    last_embed: jax.Array  # [B, W, D], of the last token before each episode


@jit_by_row(whole=1, static=("setup",))
def prefill_batch(weights: Weights, tokens_BxN: jax.Array, setup: Setup) -> PrefilledBatch:
    """Dense, always."""
    return with_embeddings(weights, tokens_BxN, prefill_blocks(weights, tokens_BxN, setup), setup)


def with_embeddings(
    weights: Weights, tokens_BxN: jax.Array, blocks: PrefilledBlock, setup: Setup
) -> PrefilledBatch:
    """PrefilledBatch blocks with the embeddings of the tokens before their episodes."""
    shape = setup.episode
    last_W = shape.prefix_len + shape.horizon * np.arange(shape.episodes_per_prefix) - 1
    return PrefilledBatch(blocks, llama.embed(weights, tokens_BxN[:, last_W]))


@jit_by_row(whole=2, static=("setup", "spec"))
def _play(
    weights: Weights,
    params: Any,
    prefilled: PrefilledBatch,
    given_BxWxJxY: jax.Array,
    setup: Setup,
    spec: ControllerSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arrays of `EntryScores` for J entries at once; see `BatchScorer.play`."""
    each, budget = _controllers(weights, params, prefilled, given_BxWxJxY, setup, spec.name)
    if spec.held:
        each = Controller(
            _holding(each.act, jnp.asarray(schedules.held_dense(setup.space, spec.held))), each.memory
        )
    rollout = run_schedules(weights, prefilled.blocks, jax.random.key(0), budget, each, setup)
    rows = setup.memory.head_rows
    logp = score_labels(weights, rollout.hidden, prefilled.blocks.episodes.label, rows)
    # A policy whose logits are no numbers picks actions all the same.
    logp = jnp.where(jnp.isfinite(rollout.logp), logp, jnp.nan)
    entropy = _entropy(weights, rollout.hidden, rows) if spec.with_entropy else logp[..., :0]
    return logp, entropy, jnp.where(rollout.controllable, rollout.action, setup.space.dense)


def _controllers(
    weights: Weights, params: Any, prefilled: PrefilledBatch, given: jax.Array, setup: Setup, name: str
) -> tuple[Controller, jax.Array]:
    """The controller of each schedule [B, W, J] and the budgets it is asked for."""
    shape = given.shape[:3]

    def spread(memory: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape, *jnp.shape(leaf))), memory)

    if name == REPLAY:
        return replay(given), jnp.zeros((*shape, len(setup.space.axes)))
    T = setup.episode.horizon
    if name == POLICY:
        greedy = policy_controller(setup.network, params, temperature=1.0, greedy=True)
        return Controller(greedy.act, spread(greedy.memory)), given
    if name == "entropy":
        steered = heuristics.entropy_controller(weights, setup.space, T)
        return Controller(steered.act, spread(steered.memory)), given
    official = name == "drift_official"
    embed = prefilled.last_embed
    steered = heuristics.drift_controller(setup.space, T, embed[0, 0], official)
    before = jnp.broadcast_to(embed[:, :, None], (*shape, embed.shape[-1]))
    return Controller(steered.act, spread(steered.memory)._replace(before_D=before)), given


def _holding(act: Callable, held_A: jax.Array) -> Callable:
    """`act` with one axis kept dense, whatever it chooses."""

    def wrapped(key: jax.Array, seen: Any, memory: Any) -> tuple[jax.Array, jax.Array, Any]:
        action, logp, memory = act(key, seen, memory)
        return held_A[action], logp, memory

    return wrapped


def _entropy(weights: Weights, hidden: jax.Array, rows: int) -> jax.Array:
    """Entropy of the predictions from hidden states [..., D], in nats; `rows` of them at a time."""

    def one(hidden_D: jax.Array) -> jax.Array:
        logits_V = llama.logits(weights, hidden_D)
        return heuristics.normalized_entropy(logits_V) * jnp.log(logits_V.shape[-1])

    flat = hidden.reshape(-1, hidden.shape[-1])
    return lax.map(one, flat, batch_size=min(rows, len(flat))).reshape(hidden.shape[:-1])


class BatchScorer:
    """Runs entries on a batch of blocks; the batch is filled up to `batch_size`, so that shapes compile once.

    Args:
      tokens_BxN: the blocks.
      batch_size: blocks that are run, at least B; filled up so that all rows of a mesh have as many.
      num_parallel: entries run at a time; changes memory and speed, never results beyond rounding.
    """

    def __init__(
        self,
        weights: Weights,
        params: Any,
        tokens_BxN: np.ndarray,
        setup: Setup,
        batch_size: int,
        num_parallel: int,
    ):
        self._weights, self._params, self._setup = weights, params, setup
        self._tokens_BxN, self._num_parallel = tokens_BxN, num_parallel
        shares = num_rows(weights)
        self.rows = np.arange(-(-batch_size // shares) * shares) % len(tokens_BxN)

    @functools.cached_property
    def dense(self) -> PrefilledBatch:
        """After the dense prefill, which is run when it is first asked for."""
        return prefill_batch(self._weights, self._tokens_BxN[self.rows], self._setup)

    def play(
        self,
        given_BxWxJxY: np.ndarray,
        spec: ControllerSpec,
        prefilled: PrefilledBatch | None = None,
        progress: Callable[[int], None] = lambda entries: None,
    ) -> EntryScores:
        """Runs J entries.

        Args:
          given_BxWxJxY: schedules for `REPLAY` (Y = T), the requested budgets for other controllers (Y = X).
          spec: see `ControllerSpec`.
          prefilled: what the entries start from; None is `dense`.
          progress: told the number of entries done since the last call.
        """
        B, J = len(self._tokens_BxN), given_BxWxJxY.shape[2]
        size = -(-J // -(-J // self._num_parallel))  # all chunks about as large
        parts = []
        for start in range(0, J, size):
            picked = np.arange(start, start + size) % J
            scores = _play(
                self._weights,
                self._params if spec.name == POLICY else None,
                self.dense if prefilled is None else prefilled,
                given_BxWxJxY[self.rows][:, :, picked],
                self._setup,
                spec,
            )
            count = min(size, J - start)
            logp, entropy, action = (x[:B, :, :count] for x in fetch(scores))
            finite("a batch of text", logp)
            parts.append(EntryScores(logp, finite("a batch of text", entropy), action))
            progress(count)
        return join(parts, axis=2)
