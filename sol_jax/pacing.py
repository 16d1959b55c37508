"""Two ways to make a policy meet its budgets, neither of them the paper's.

`restated`: before each step the policy is asked for what is left of the budget per step, as if the episode
began there.  It can be trained so, and a policy that was not can be asked so all the same.

`pacing_scores`: episodes that end on their budget, whatever the policy has learned.  It has one output per
axis instead of a score per level: by how much the next step should be dearer than what is left per step.
Levels score by how near they are to that, and those after which the episode could no longer end on the
requested mean cost are ruled out.  So the mean cost of an episode is the requested one, to half the largest
step between levels over T; a policy that has learned nothing spends evenly, and what it learns is where to
spend, not how much.

Both follow from the scalars that every observation has, so rollouts and gradients see the same.  Steps that
may not be controlled count as if they had met the target, which only prompts of a few tokens have.

Here `L` counts the levels of an axis.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Deviation of the levels that are tried, as a share of the axis' range; at least half a step between levels,
# or those of coarse axes would never be tried.
SPREAD = 0.2
RULED_OUT = -1e9  # finite, so that entropies stay numbers
_TOLERANCE = 1e-4  # of costs, for rounding: sums of T of them


def restated(scalars_N: jax.Array, num_axes: int, horizon: int) -> jax.Array:
    """The scalars of an observation with what is left per step as targets, and no differences from them."""
    left_X, steps_left = _left(scalars_N, num_axes, horizon)
    target_X = jnp.clip(left_X / steps_left, 0.0, 1.0)
    return jnp.concatenate([scalars_N[:2], target_X, jnp.zeros(num_axes)])


def pacing_scores(
    extra_X: jax.Array, scalars_N: jax.Array, costs: tuple[tuple[float, ...], ...], horizon: int
) -> jax.Array:
    """Scores of the levels of every axis, one axis after the other, before one step.

    Args:
      extra_X: how much dearer than what is left per step the step should be, in deviations of the levels that
        are tried: 1 shifts them by one.
      scalars_N: of an observation (`policy.observation_scalars`).
      costs: per axis the costs of its levels, ascending.
      horizon: T.
    """
    left_X, steps_left = _left(scalars_N, len(costs), horizon)
    scores = [
        _near(left / steps_left, extra, of_axis) + _ruled_out(left, steps_left, of_axis)
        for left, extra, of_axis in zip(left_X, extra_X, costs, strict=True)
    ]
    return jnp.concatenate(scores)


def _left(scalars_N: jax.Array, num_axes: int, horizon: int) -> tuple[jax.Array, jax.Array]:
    """What is left of each axis' budget, and for how many steps, the coming one included."""
    progress, target_X, gap_X = scalars_N[0], scalars_N[2 : 2 + num_axes], scalars_N[2 + num_axes :]
    steps_left = horizon * (1.0 - progress) + 1.0
    return steps_left * target_X - (horizon - steps_left) * gap_X, steps_left


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


def _near(mean: jax.Array, extra: jax.Array, costs: tuple[float, ...]) -> jax.Array:
    """Scores of the levels of an axis: the log of a normal density, `extra` deviations above `mean`."""
    cost_L, span = np.array(costs, np.float32), costs[-1] - costs[0]
    if not span:
        return jnp.zeros(len(costs))
    deviation = max(SPREAD * span, max(np.diff(costs)) / 2)
    from_mean_L = (cost_L - jnp.clip(mean, costs[0], costs[-1])) / deviation
    # Without the square of `extra`, the same for all levels, which could outgrow RULED_OUT.
    return from_mean_L * (extra - from_mean_L / 2)
