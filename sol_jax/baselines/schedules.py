"""Schedules that need no policy: what a controller must beat at the same budget.

A schedule is a row of joint actions.  These are plain data, made on the host and played by
`rollout.replay`; targets are mean costs per axis, as the policy realised them.  Steps that may not be
controlled get the dense action, which they would take anyway, and count for nothing.

Source: docs/method.md, "Comparisons".
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sol_jax.axes.base import ActionSpace, Axis
from sol_jax.rl.config import EpisodeConfig

# The authors' offsets between the axes that they correct over time; they mix any other axis over rows.
_OFFICIAL_SHIFT = {"rho": 17, "eta": 37}


class Mix(NamedTuple):
    """The two levels around a target cost, by index, and the share of steps for the higher one."""

    low: int
    high: int
    share: float


def mix(axis: Axis, target: float) -> Mix:
    """The nearest levels below and above `target`; beyond the axis' ends, the end level alone.

    Of levels that cost the same (in bytes or time) it is the highest.
    """
    costs = np.array([axis.cost(level) for level in axis.levels])
    high = min(int(np.searchsorted(costs, target)), len(costs) - 1)
    low = high if costs[high] <= target or high == 0 else high - 1
    low, high = (int(np.searchsorted(costs, costs[i], "right")) - 1 for i in (low, high))
    span = costs[high] - costs[low]
    return Mix(low, high, float((target - costs[low]) / span) if span else 0.0)


def controllable(shape: EpisodeConfig, num_blocks: int) -> np.ndarray:
    """Which steps of which sequences may be controlled, [N * W, T]; a block's W episodes are neighbours."""
    start_W = shape.prefix_len + shape.horizon * np.arange(shape.episodes_per_prefix)
    keys_WxT = start_W[:, None] + np.arange(shape.horizon) + 1
    return np.tile(keys_WxT > shape.uncontrolled, (num_blocks, 1))


def dense(space: ActionSpace, num_sequences: int, horizon: int) -> np.ndarray:
    """Every axis at its top level: actions [N, T]."""
    return np.full((num_sequences, horizon), space.dense, np.int32)


def held_dense(space: ActionSpace, axis_name: str) -> np.ndarray:
    """For each action the same one with axis `axis_name` at its top level: actions [A]."""
    held = [axis.name == axis_name for axis in space.axes]
    if not any(held):
        names = ", ".join(axis.name for axis in space.axes)
        raise ValueError(f"there is no axis {axis_name!r} to hold dense; the axes are {names}")
    top = [len(axis.levels) - 1 for axis in space.axes]
    level_AxX = np.indices([last + 1 for last in top]).reshape(len(top), -1).T
    return _join(space, np.where(held, top, level_AxX))


def fixed(space: ActionSpace, target_X: np.ndarray, controllable_NxT: np.ndarray) -> np.ndarray:
    """The static schedule matched to `target_X`: actions [N, T].

    Each axis alternates between the two levels around its target.  The steps of all sequences form one
    line along which the higher level is spread evenly, so the mean over the data meets the target to one
    step, and each sequence's own mean to one step of its own.
    """
    high_NxTxX = np.stack([_spread_steps(space, x, t, controllable_NxT) for x, t in enumerate(target_X)], -1)
    return _actions(space, target_X, high_NxTxX, controllable_NxT)


def best_mix(
    loss_X: Sequence[np.ndarray], cost_X: Sequence[np.ndarray], share_X: Sequence[float], total: float
) -> np.ndarray:
    """The mean costs [X] that lose least of all that make a step cost `total`, if losses of axes add up.

    What no look at the text can beat at one budget for all axes.  Of each axis `loss_X[x]` says what each
    level loses on average, and `cost_X[x]` its cost; a step costs 1 - sum(share * (1 - cost)).  A total out
    of reach is taken for the nearest that is not.
    """
    left = 1.0 - sum(share * (1.0 - cost[-1]) for share, cost in zip(share_X, cost_X, strict=True)) - total
    found = np.array([cost[-1] for cost in cost_X], np.float64)
    # From the top down, along what each axis loses per share of a step that it saves: convex, so the
    # cheapest savings of all axes come first.
    edges = []
    for x, (loss, cost, share) in enumerate(zip(loss_X, cost_X, share_X, strict=True)):
        hull = _lower_hull(np.asarray(cost, np.float64), np.asarray(loss, np.float64))
        for high, low in itertools.pairwise(hull):
            saved = share * (cost[high] - cost[low])
            if saved > 0:
                edges.append(((loss[low] - loss[high]) / saved, x, saved, cost[high] - cost[low]))
    for _, x, saved, span in sorted(edges, key=lambda edge: edge[0]):
        part = min(1.0, max(0.0, left) / saved)
        found[x] -= part * span
        left -= part * saved
    return found


def _lower_hull(cost_n: np.ndarray, loss_n: np.ndarray) -> list[int]:
    """The levels on the lower convex hull of loss over cost, from the dearest down."""
    hull: list[int] = []
    for i in range(len(cost_n) - 1, -1, -1):
        if hull and cost_n[i] >= cost_n[hull[-1]]:
            continue  # as dear as one that loses no more
        while len(hull) > 1:
            a, b = hull[-2:]
            # Is b on or above the line from a to i?
            if (loss_n[b] - loss_n[a]) * (cost_n[a] - cost_n[i]) < (loss_n[i] - loss_n[a]) * (
                cost_n[a] - cost_n[b]
            ):
                break
            hull.pop()
        hull.append(i)
    return hull


def front(space: ActionSpace, target_X: np.ndarray, controllable_NxT: np.ndarray) -> np.ndarray:
    """The counts of `fixed`, the higher levels first in every sequence: actions [N, T].

    Later steps attend to the cache entries of earlier ones, so spending early may help them too.  That needs
    no look at the text: a policy that has learned no more gains nothing over this schedule.
    """
    rank_NxT = np.cumsum(controllable_NxT, 1) - 1
    count_NxX = [_spread_steps(space, x, t, controllable_NxT).sum(1) for x, t in enumerate(target_X)]
    high_NxTxX = rank_NxT[..., None] < np.stack(count_NxX, -1)[:, None]
    return _actions(space, target_X, high_NxTxX, controllable_NxT)


def clock(space: ActionSpace, target_TxX: np.ndarray, controllable_NxT: np.ndarray) -> np.ndarray:
    """A target for every step of the episode, whatever the text: actions [N, T].

    In each step the sequences take the two levels around its target, the higher one spread evenly over them.
    At the mean costs that a policy has at each step this is what it does without a look at the text.
    """
    actions = []
    for t in range(controllable_NxT.shape[1]):
        # The golden ratio, so that no sequence has the higher level again and again.
        phase, may_Nx1 = 0.618034 * t, controllable_NxT[:, t : t + 1]
        high = [_spread_steps(space, x, float(c), may_Nx1, phase) for x, c in enumerate(target_TxX[t])]
        actions.append(_actions(space, target_TxX[t], np.stack(high, -1), may_Nx1))
    return np.concatenate(actions, 1)


def random(
    space: ActionSpace,
    target_X: np.ndarray,
    controllable_NxT: np.ndarray,
    num_draws: int,
    rng: np.random.Generator,
    rounded: bool = False,
) -> np.ndarray:
    """Matched schedules in random order: actions [N, R, T] for R draws.

    In each sequence every axis has its two levels in the counts of `fixed`, shuffled anew per draw.  With
    `rounded` the counts are the authors': the share of each sequence's own steps, rounded half to even,
    which misses the target by up to half a step of each sequence, the same way in all.
    """
    (N, T), X = controllable_NxT.shape, len(space.axes)
    high = np.zeros((N, num_draws, T, X), bool)
    for x, (axis, target) in enumerate(zip(space.axes, target_X, strict=True)):
        if rounded:
            count_N = np.round(mix(axis, float(target)).share * controllable_NxT.sum(1))
        else:
            count_N = _spread_steps(space, x, float(target), controllable_NxT).sum(1)
        # The steps with the smallest random numbers; those that are not controlled have none.
        lot = np.where(controllable_NxT[:, None], rng.random((N, num_draws, T)), np.inf)
        rank = np.argsort(np.argsort(lot, -1), -1)
        high[..., x] = rank < count_N[:, None, None]
    return _actions(space, target_X, high, controllable_NxT[:, None])


def fixed_official(
    space: ActionSpace, target_X: np.ndarray, controllable_NxT: np.ndarray, batch_size: int
) -> np.ndarray:
    """The authors' static schedule: actions [N, T]; sequences in order, `batch_size` to a batch.

    In each step of a batch a number of rows take the higher level, a run of rows that moves on from step
    to step.  For kappa that number is the rounded share of the rows, with no correction over time: in a
    batch of one row it is all or nothing.  For rho and eta it is what a running average over the whole
    evaluation asks for.
    """
    N, T = controllable_NxT.shape
    high_NxTxX = np.zeros((N, T, len(space.axes)), bool)
    for x, (axis, target) in enumerate(zip(space.axes, target_X, strict=True)):
        low, high, share = mix(axis, float(target))
        low_cost, high_cost = axis.cost(axis.levels[low]), axis.cost(axis.levels[high])
        shift = _OFFICIAL_SHIFT.get(axis.name)
        spent, steps = 0.0, 0
        for start in range(0, N, batch_size):
            for t in range(T):
                rows = start + np.flatnonzero(controllable_NxT[start : start + batch_size, t])
                n = len(rows)
                if n == 0:
                    continue
                if shift is not None and high != low:
                    required = (target * (steps + n) - spent) / n
                    share = (required - low_cost) / (high_cost - low_cost)
                count = int(np.clip(np.round(share * n), 0, n))
                first = (t + (shift or 0)) * max(count, 1) % n
                high_NxTxX[rows[(first + np.arange(count)) % n], t, x] = True
                spent += count * high_cost + (n - count) * low_cost
                steps += n
    return _actions(space, target_X, high_NxTxX, controllable_NxT)


def _actions(
    space: ActionSpace, target_X: np.ndarray, high: np.ndarray, controllable: np.ndarray
) -> np.ndarray:
    """Joint actions of which of the two levels around its target each axis takes, [..., X]."""
    mixes = [mix(axis, float(target)) for axis, target in zip(space.axes, target_X, strict=True)]
    level = np.where(high, [m.high for m in mixes], [m.low for m in mixes])
    return np.where(controllable, _join(space, level), space.dense).astype(np.int32)


def _join(space: ActionSpace, level: np.ndarray) -> np.ndarray:
    """`space.join` on the host, where new shapes cost no compilation."""
    sizes = tuple(len(axis.levels) for axis in space.axes)
    return np.ravel_multi_index(tuple(np.moveaxis(level, -1, 0)), sizes).astype(np.int32)


def _spread_steps(
    space: ActionSpace, x: int, target: float, controllable_NxT: np.ndarray, phase: float = 0.0
) -> np.ndarray:
    """Which steps take the higher level of axis `x`: evenly spread over the controllable ones, [N, T]."""
    high_NxT = np.zeros(controllable_NxT.shape, bool)
    # Axes are out of phase, so that no step is dear on all of them at once.
    offset = (x / len(space.axes) + phase) % 1.0
    high_NxT[controllable_NxT] = _spread(mix(space.axes[x], target).share, controllable_NxT.sum(), offset)
    return high_NxT


def _spread(share: float, count: int, offset: float) -> np.ndarray:
    """Booleans [count] of which a `share` is true, as evenly as can be (Bresenham's line)."""
    # Rounded, or shares such as 3 * (1/3) would fall short of a whole step by one unit in the last place.
    reached = np.floor(np.round(np.arange(count + 1) * share + offset, 9))
    return np.diff(reached) > 0
