"""Schedules that need no policy: what a controller must beat at the same budget.

A schedule is a row of joint actions.  These are plain data, made on the host and played by
`rollout.replay`; targets are mean costs per axis, as the policy realised them.

Source: sol.md section 7.  Unlike the authors' fixed schedule, which mixes kappa over the rows of a batch,
`fixed` meets its target in every sequence up to one step.
"""

from typing import NamedTuple

import numpy as np

from sol_jax.axes import ActionSpace, Axis


class Mix(NamedTuple):
    """The two levels around a target cost, by index, and the share of steps for the higher one."""

    low: int
    high: int
    share: float


def mix(axis: Axis, target: float) -> Mix:
    """The nearest levels below and above `target`; beyond the axis' ends, the end level alone."""
    costs = np.array([axis.cost(level) for level in axis.levels])
    high = min(int(np.searchsorted(costs, target)), len(costs) - 1)
    low = high if costs[high] <= target or high == 0 else high - 1
    span = costs[high] - costs[low]
    return Mix(low, high, float((target - costs[low]) / span) if span else 0.0)


def _spread(share: float, count: int, offset: float) -> np.ndarray:
    """Booleans [count] of which a `share` is true, as evenly as can be (Bresenham's line)."""
    # Rounded, or shares such as 3 * (1/3) would fall short of a whole step by one unit in the last place.
    reached = np.floor(np.round(np.arange(count + 1) * share + offset, 9))
    return np.diff(reached) > 0


def _offset(axis_index: int, num_axes: int) -> float:
    """Axes take their higher levels out of phase, so that no step is dear on all of them at once."""
    return axis_index / num_axes


def dense(space: ActionSpace, num_sequences: int, horizon: int) -> np.ndarray:
    """Every axis at its top level: actions [N, T]."""
    return np.full((num_sequences, horizon), space.dense, np.int32)


def fixed(space: ActionSpace, target_X: np.ndarray, num_sequences: int, horizon: int) -> np.ndarray:
    """The static schedule matched to `target_X`: actions [N, T].

    Each axis alternates between the two levels around its target.  The steps of all sequences form one
    line along which the higher level is spread evenly, so the mean over the data meets the target to one
    step, and each sequence's own mean to one step of its T.
    """
    level_NxTxX = np.zeros((num_sequences, horizon, len(space.axes)), np.int32)
    for x, (axis, target) in enumerate(zip(space.axes, target_X, strict=True)):
        levels = mix(axis, float(target))
        high = _spread(levels.share, num_sequences * horizon, _offset(x, len(space.axes)))
        level_NxTxX[..., x] = np.where(high, levels.high, levels.low).reshape(num_sequences, horizon)
    return np.asarray(space.join(level_NxTxX), np.int32)


def random(
    space: ActionSpace,
    target_X: np.ndarray,
    num_sequences: int,
    horizon: int,
    num_draws: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Matched schedules in random order: actions [N, R, T] for R draws.

    In each sequence every axis has its two levels in the counts of `fixed`, shuffled anew per draw.
    """
    level = np.zeros((num_sequences, num_draws, horizon, len(space.axes)), np.int32)
    for x, (axis, target) in enumerate(zip(space.axes, target_X, strict=True)):
        levels = mix(axis, float(target))
        high = _spread(levels.share, num_sequences * horizon, _offset(x, len(space.axes)))
        count_N = high.reshape(num_sequences, horizon).sum(1)
        ordered_NxRxT = np.broadcast_to(
            (np.arange(horizon) < count_N[:, None])[:, None], (num_sequences, num_draws, horizon)
        )
        shuffled = rng.permuted(ordered_NxRxT, axis=-1)
        level[..., x] = np.where(shuffled, levels.high, levels.low)
    return np.asarray(space.join(level), np.int32)
