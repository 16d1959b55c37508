"""The collecting half of an update: prefill blocks, roll schedules out, and score what they did.

Everything leads with [B, W, K]: blocks, episodes of a block, schedules of an episode.  Evaluation plays its
schedules through the same functions.

Source: docs/method.md, "The episode"; arXiv 2605.10875 section 3.3.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sol_jax.axes.base import ActionSpace, Axis
from sol_jax.models.llama import IndexedCache, Weights
from sol_jax.rl import rewards
from sol_jax.rl.rollout import (
    Controller,
    Episode,
    PrefilledBlock,
    Rollout,
    acceptance_logp,
    dense_divergence,
    group_rollout,
    label_logp,
    prefill_block,
)
from sol_jax.rl.setup import Setup


def draw_budgets(key: jax.Array, shape: tuple[int, ...], space: ActionSpace) -> jax.Array:
    """Requested mean cost per axis, [*shape, X]: uniform in the axis' range, or one of its choices."""

    def draw(key: jax.Array, axis: Axis) -> jax.Array:
        if axis.budget_choices:
            return jax.random.choice(key, jnp.array(axis.budget_choices, jnp.float32), shape)
        low, high = axis.budget
        return jax.random.uniform(key, shape, minval=low, maxval=high)

    keys = jax.random.split(key, len(space.axes))
    return jnp.stack([draw(k, axis) for k, axis in zip(keys, space.axes, strict=True)], -1)


def prefill_blocks(
    weights: Weights,
    tokens_BxN: jax.Array,
    setup: Setup,
    with_dense: bool = False,
    early_B: jax.Array | None = None,
) -> PrefilledBlock:
    """`prefill_block` of each block, `memory.prefill_batch` blocks at a time; leading axis B."""

    def one(block: tuple[jax.Array, jax.Array | int]) -> PrefilledBlock:
        tokens_N, early = block
        return prefill_block(weights, tokens_N, setup.rules, with_dense, early)

    with jax.named_scope("prefill"):
        batch = min(setup.memory.prefill_batch, len(tokens_BxN))
        if early_B is None:  # starts are constants of the program
            return lax.map(lambda tokens_N: one((tokens_N, 0)), tokens_BxN, batch_size=batch)
        return lax.map(one, (tokens_BxN, early_B), batch_size=batch)


def run_schedules(
    weights: Weights,
    blocks: PrefilledBlock,
    key: jax.Array,
    budget_BxWxKxX: jax.Array,
    controller: Controller,
    setup: Setup,
) -> Rollout:
    """K schedules of every episode as one batch: [B, W, K, ...].  `controller.memory` has those axes too.

    `key` is one for all, which is split, or one for each schedule [B, W, K].
    """

    def group(
        cache: IndexedCache, episode: Episode, key_K: jax.Array, budget_KxX: jax.Array, memory_K: Any
    ) -> Rollout:
        each = Controller(controller.act, memory_K)
        return group_rollout(weights, setup.rules, cache, episode, key_K, budget_KxX, each)

    keys = key if key.shape else jax.random.split(key, budget_BxWxKxX.shape[:-1])
    with jax.named_scope("rollout"):
        over_episodes = jax.vmap(group, in_axes=(None, 0, 0, 0, 0))  # those of a block share its cache
        return jax.vmap(over_episodes)(blocks.cache, blocks.episodes, keys, budget_BxWxKxX, controller.memory)


def score_labels(weights: Weights, hidden: jax.Array, label_BxWxT: jax.Array, rows: int) -> jax.Array:
    """Log-probability of every label under every schedule's hidden states [B, W, K, T, D]: [B, W, K, T].

    `rows` hidden states at a time.  Done after the scan, so that it is a few large matrix products instead of
    T small ones.
    """
    label_BxWxKxT = jnp.broadcast_to(label_BxWxT[:, :, None], hidden.shape[:-1])
    inputs = hidden.reshape(-1, hidden.shape[-1]), label_BxWxKxT.reshape(-1)
    with jax.named_scope("head"):
        logp_N = lax.map(lambda x: label_logp(weights, *x), inputs, batch_size=min(rows, len(inputs[0])))
    return logp_N.reshape(label_BxWxKxT.shape)


def beside_dense(
    measure: Callable[[Weights, jax.Array, jax.Array], jax.Array],
    weights: Weights,
    hidden: jax.Array,
    dense_BxWxTxD: jax.Array,
    rows: int,
) -> jax.Array:
    """`measure(weights, dense_D, hidden_D)` of every step of every schedule, [B, W, K, T]."""
    dense = jnp.broadcast_to(dense_BxWxTxD[:, :, None], hidden.shape)
    inputs = dense.reshape(-1, hidden.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    with jax.named_scope("head"):
        measured_N = lax.map(lambda x: measure(weights, *x), inputs, batch_size=min(rows, len(inputs[0])))
    return measured_N.reshape(hidden.shape[:-1])


def collect(
    weights: Weights,
    controller: Controller,
    tokens_BxN: jax.Array,
    key: jax.Array,
    budget_BxWxX: jax.Array,
    setup: Setup,
    early_B: jax.Array | None = None,
    place_BxWxKxTxX: jax.Array | None = None,
) -> tuple[Rollout, jax.Array]:
    """K rollouts of every episode of a batch of blocks, and their rewards: [B, W, K, T, ...].

    With `place_BxWxKxTxX` the controller is a `placed_controller`, which acts at these places.
    """
    blocks = prefill_blocks(weights, tokens_BxN, setup, setup.needs_dense, early_B)
    K = setup.grpo.num_schedules
    shape = (*budget_BxWxX.shape[:2], K)
    budget_BxWxKxX = jnp.broadcast_to(budget_BxWxX[:, :, None], (*shape, budget_BxWxX.shape[-1]))
    memory = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape, *leaf.shape)), controller.memory)
    if place_BxWxKxTxX is not None:
        memory = memory, place_BxWxKxTxX
    rollout = run_schedules(weights, blocks, key, budget_BxWxKxX, Controller(controller.act, memory), setup)
    return rollout, _rewards(weights, blocks, rollout, setup)


def _rewards(weights: Weights, blocks: PrefilledBlock, rollout: Rollout, setup: Setup) -> jax.Array:
    """What each step of each schedule earns, [B, W, K, T]."""
    w, rows, hidden = setup.grpo.divergence_weight, setup.memory.head_rows, rollout.hidden

    def against_dense(measure: Callable[..., jax.Array]) -> jax.Array:
        assert blocks.dense_hidden is not None  # `needs_dense` says that it is there
        return beside_dense(measure, weights, hidden, blocks.dense_hidden, rows)

    logp = kl = jnp.zeros(())
    if w < 1 and setup.grpo.reward == "acceptance":
        logp = against_dense(acceptance_logp)
    elif w < 1:
        logp = score_labels(weights, hidden, blocks.episodes.label, rows)
    if w > 0:
        kl = against_dense(dense_divergence)
    return rewards.task_reward(logp, kl, w)
