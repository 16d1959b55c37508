"""Episodes that end on their budget, whatever the policy has learned (not the paper's).

A paced policy adds `pacing_scores` to its own scores of each axis' levels.  They do two things:

- a level after which the episode could no longer end on the requested mean cost is ruled out, so that the
  mean cost of an episode is the requested one, to half the largest step between levels over T;
- among the others they stand for a distribution whose mean is what is left of the budget per step.  A policy
  that has learned nothing thus plays random schedules of the requested cost, and what it learns is where to
  spend, not how much.

All of it follows from the scalars that every observation has, so rollouts and gradients see the same.  Steps
that may not be controlled count as if they had met the target, which only prompts of a few tokens have.

Here `G` counts the points of a table and `L` the levels of an axis.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

SPREAD = 0.25  # standard deviation of the levels that are tried, as a share of the axis' range
POINTS = 33
RULED_OUT = -1e9  # finite, so that entropies stay numbers
_TOLERANCE = 1e-4  # of costs, for rounding: sums of T of them


def pacing_scores(scalars_N: jax.Array, costs: tuple[tuple[float, ...], ...], horizon: int) -> jax.Array:
    """Scores of the levels of every axis, one axis after the other, before one step.

    Args:
      scalars_N: of an observation (`policy.observation_scalars`).
      costs: per axis the costs of its levels, ascending.
      horizon: T.
    """
    X = len(costs)
    progress, target_X, gap_X = scalars_N[0], scalars_N[2 : 2 + X], scalars_N[2 + X :]
    steps_left = horizon * (1.0 - progress) + 1.0  # this one included
    left_X = steps_left * target_X - (horizon - steps_left) * gap_X
    scores = [
        _mean_scores(left / steps_left, of_axis) + _ruled_out(left, steps_left, of_axis)
        for left, of_axis in zip(left_X, costs, strict=True)
    ]
    return jnp.concatenate(scores)


def _ruled_out(left: jax.Array, steps_left: jax.Array, costs: tuple[float, ...]) -> jax.Array:
    """0 or `RULED_OUT` per level: what is `left` of the axis' budget must suit the steps after this one."""
    cost_L = jnp.asarray(costs)
    slack = max(np.diff(costs), default=0.0) / 2
    after_L, later = left - cost_L, steps_left - 1.0
    too_little_L = later * costs[0] - after_L
    too_much_L = after_L - later * costs[-1]
    miss_L = jnp.maximum(jnp.maximum(too_little_L, too_much_L) - slack, 0.0)
    # A target that the levels cannot meet at all leaves those that come closest.
    return jnp.where(miss_L <= jnp.min(miss_L) + _TOLERANCE, 0.0, RULED_OUT)


def _mean_scores(mean: jax.Array, costs: tuple[float, ...]) -> jax.Array:
    """Log-probabilities of the levels of an axis under a distribution of that mean cost."""
    table_GxL = jnp.asarray(_table(costs))
    if len(costs) == 1:
        return jnp.zeros(1)
    place = (jnp.clip(mean, costs[0], costs[-1]) - costs[0]) / (costs[-1] - costs[0]) * (len(table_GxL) - 1)
    below = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, len(table_GxL) - 2)
    share = place - below
    # A mixture of two distributions has the mixture of their means.
    return jnp.log((1.0 - share) * table_GxL[below] + share * table_GxL[below + 1] + 1e-6)


@functools.cache
def _table(costs: tuple[float, ...]) -> np.ndarray:
    """Distributions over an axis' levels, [G, L], whose means are evenly spaced from end to end.

    Each is a normal density at the levels, of `SPREAD` times the range as deviation, tilted to its mean.
    """
    cost_L = np.array(costs)
    if len(cost_L) == 1:
        return np.ones((1, 1))
    unit_L = (cost_L - cost_L[0]) / (cost_L[-1] - cost_L[0])
    low, high = (np.full(POINTS, end) for end in (-1e4, 1e4))
    mean_G = np.linspace(0.0, 1.0, POINTS)

    def tilted(tilt_G: np.ndarray) -> np.ndarray:
        score_GxL = tilt_G[:, None] * unit_L - unit_L**2 / (2 * SPREAD**2)
        weight_GxL = np.exp(score_GxL - score_GxL.max(1, keepdims=True))
        return weight_GxL / weight_GxL.sum(1, keepdims=True)

    for _ in range(60):  # bisection: the mean rises with the tilt
        middle = (low + high) / 2
        below = tilted(middle) @ unit_L < mean_G
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return tilted((low + high) / 2).astype(np.float32)
