"""Episodes that end on their budget, whatever the policy has learned (not the paper's).

A paced policy adds `pacing_scores` to its own scores of each axis' levels.  They do two things:

- a level after which the episode could no longer end on the requested mean cost is ruled out, so that the
  mean cost of an episode is the requested one, to half the largest step between levels over T;
- the others score by how near they are to what is left of the budget per step.  A policy that has learned
  nothing thus plays schedules near the requested cost, random or, greedy, about the fixed one, and what it
  learns is where to spend, not how much.

All of it follows from the scalars that every observation has, so rollouts and gradients see the same.  Steps
that may not be controlled count as if they had met the target, which only prompts of a few tokens have.

Here `L` counts the levels of an axis.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Deviation of the levels that are tried from what is left per step, as a share of the axis' range; at least
# half a step between levels, or those of coarse axes would never be tried.
SPREAD = 0.2
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
        _near(left / steps_left, of_axis) + _ruled_out(left, steps_left, of_axis)
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


def _near(mean: jax.Array, costs: tuple[float, ...]) -> jax.Array:
    """Scores of the levels of an axis: the log of a normal density around what is left per step."""
    cost_L, span = np.array(costs, np.float32), costs[-1] - costs[0]
    if not span:
        return jnp.zeros(len(costs))
    deviation = max(SPREAD * span, max(np.diff(costs)) / 2)
    return -jnp.square((cost_L - jnp.clip(mean, costs[0], costs[-1])) / deviation) / 2
