"""Handcrafted controllers: each axis follows its required average, nudged by how uncertain the model is.

They are `rollout.Controller`s, so they run through the rollout of training, many at a time.  Their
targets are the budgets that the rollout shows them; memory is one schedule's.

Source: docs/method.md, "Comparisons".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sol_jax.axes.base import ActionSpace
from sol_jax.models import llama
from sol_jax.models.llama import Weights
from sol_jax.rl.policy import Observation
from sol_jax.rl.rollout import Controller

GAIN = 0.35  # the authors' gamma: how far the signal moves the share of the higher level


class Steering(NamedTuple):
    """What a heuristic remembers of one schedule."""

    step: jax.Array
    counted: jax.Array  # controllable steps so far
    spent_X: jax.Array  # their costs, summed
    before_D: jax.Array  # the state that the next drift is measured from


def normalized_entropy(logits_V: jax.Array) -> jax.Array:
    """Entropy of the predicted distribution over that of a uniform one, in [0, 1]."""
    logp_V = jax.nn.log_softmax(logits_V)
    return -jnp.sum(jnp.exp(logp_V) * logp_V) / jnp.log(logits_V.shape[-1])


def _cosine(a_D: jax.Array, b_D: jax.Array) -> jax.Array:
    norms = jnp.maximum(jnp.linalg.norm(a_D), 1e-8) * jnp.maximum(jnp.linalg.norm(b_D), 1e-8)
    return jnp.dot(a_D, b_D, precision="highest") / norms


def drift(a_D: jax.Array, b_D: jax.Array) -> jax.Array:
    """How far two vectors point apart: 0 for the same direction, 1 for opposite ones."""
    return 0.5 * (1.0 - _cosine(a_D, b_D))


def drift_official(a_D: jax.Array, b_D: jax.Array) -> jax.Array:
    """The authors' drift: a misplaced parenthesis clamps before halving, so it is never above 0.5.

    Centred at 0.5 as a signal must be, it can only push towards the lower level.
    """
    return 0.5 * jnp.clip(1.0 - _cosine(a_D, b_D), 0.0, 1.0)


def choose_level(
    cost_N: jax.Array,
    required: jax.Array,
    due: jax.Array,
    remaining: jax.Array,
    signal: jax.Array,
    gain: float = GAIN,
) -> jax.Array:
    """The level of one axis for one step, by index.

    `cost_N` ascends; of levels that cost the same the highest is taken.  The average cost `required` of the
    steps that remain (this one included) picks two levels and the share of the higher one; the signal shifts
    that share; a half decides.  The result stays among the levels from which the sum `due` of these steps
    can still be met.
    """
    low_cost, high_cost, last = cost_N[0], cost_N[-1], cost_N.shape[0] - 1
    required = jnp.clip(required, low_cost, high_cost)
    first = jnp.clip(jnp.searchsorted(cost_N, required, side="left"), 0, last)
    high = jnp.searchsorted(cost_N, cost_N[first], side="right") - 1
    low = jnp.where(first > 0, first - 1, high)
    span = cost_N[high] - cost_N[low]
    share = jnp.where(span > 1e-8, (required - cost_N[low]) / jnp.maximum(span, 1e-8), 1.0)
    share = jnp.clip(share + gain * (signal - 0.5), 0.0, 1.0)
    chosen = jnp.where((share >= 0.5) & (high != low), high, low)
    least = jnp.clip(due - high_cost * (remaining - 1), low_cost, high_cost)
    most = jnp.clip(due - low_cost * (remaining - 1), low_cost, high_cost)
    highest = jnp.searchsorted(cost_N, most, side="right") - 1
    lowest = jnp.clip(jnp.minimum(jnp.searchsorted(cost_N, least, side="left"), highest), 0, last)
    return jnp.clip(chosen, lowest, jnp.clip(highest, lowest, last))


def _steered(
    space: ActionSpace,
    horizon: int,
    before_D: jax.Array,
    read: Callable[[Observation, Steering], jax.Array],
) -> Controller:
    """The controller that lets the signal `read` steer every axis."""
    # float32 throughout, as the authors' tensors: levels that tie in one precision differ in another.
    costs = [np.array([axis.cost(level) for level in axis.levels], np.float32) for axis in space.axes]

    def act(key: jax.Array, seen: Observation, memory: Steering) -> tuple[jax.Array, jax.Array, Steering]:
        target_X, is_controllable = seen.target, seen.controllable
        # Once a step may be controlled, so may all later ones.
        remaining = (horizon - memory.step).astype(jnp.float32)
        signal = read(seen, memory)
        due_X = target_X * (memory.counted + remaining) - memory.spent_X
        level_X = jnp.stack(
            [
                choose_level(jnp.asarray(cost_N), due_X[x] / remaining, due_X[x], remaining, signal)
                for x, cost_N in enumerate(costs)
            ]
        )
        cost_X = jnp.stack([jnp.asarray(cost_N)[level_X[x]] for x, cost_N in enumerate(costs)])
        memory = Steering(
            memory.step + 1,
            memory.counted + is_controllable,
            memory.spent_X + is_controllable * cost_X,
            seen.hidden,
        )
        return space.join(level_X).astype(jnp.int32), jnp.float32(0.0), memory

    start = Steering(jnp.int32(0), jnp.float32(0), jnp.zeros(len(costs)), before_D)
    return Controller(act, start)


def entropy_controller(weights: Weights, space: ActionSpace, horizon: int) -> Controller:
    """Spends more where the previous prediction, made under the compression so far, was uncertain."""

    def read(seen: Observation, memory: Steering) -> jax.Array:
        return normalized_entropy(llama.logits(weights, seen.hidden))

    return _steered(space, horizon, jnp.zeros(weights["final_norm"].shape), read)


def drift_controller(
    space: ActionSpace, horizon: int, embed_D: jax.Array, official: bool = False
) -> Controller:
    """Spends more where the last hidden state turned most; before there are two, the embeddings count.

    `embed_D` is the embedding of the prefix' last token.
    """
    measure = drift_official if official else drift

    def read(seen: Observation, memory: Steering) -> jax.Array:
        now_D = jnp.where(memory.step == 0, seen.embed, seen.hidden)
        return measure(now_D, memory.before_D)

    return _steered(space, horizon, embed_D, read)
