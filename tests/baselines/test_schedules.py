"""Fixed and random schedules meet their targets, whatever the targets, levels and sizes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from sol_jax.axes.base import ActionSpace
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.baselines import schedules
from sol_jax.rl.config import EpisodeConfig


def space_of(kappa=(0.1, 1.0), rho=(0.4, 0.7, 1.0), bits=(5.0, 8.0, 16.0)):
    return ActionSpace(
        (
            Quest(kappa, (kappa[0], kappa[-1]), 100.0),
            ChannelPruning(rho, (0.4, 1.0), 100.0),
            OutputQuantization(bits, (0.3125, 1.0), 200.0),
        )
    )


def levels_of(low, high, step):
    grid = st.integers(round(low / step), round(high / step))
    return st.lists(grid, min_size=1, max_size=6, unique=True).map(
        lambda chosen: tuple(round(n * step, 4) for n in sorted(chosen))
    )


@st.composite
def problems(draw):
    bits = st.lists(st.integers(2, 16), min_size=1, max_size=6, unique=True)
    space = space_of(
        draw(levels_of(0.05, 1.0, 0.05)),
        draw(levels_of(0.05, 1.0, 0.05)),
        tuple(map(float, sorted(draw(bits)))),
    )
    ends = [(axis.cost(axis.levels[0]), axis.cost(axis.levels[-1])) for axis in space.axes]
    target_X = np.array([low + draw(st.floats(0, 1)) * (high - low) for low, high in ends])
    return space, target_X, draw(st.integers(1, 12)), draw(st.integers(1, 20))


def every(num_sequences, horizon):
    """All steps controllable."""
    return np.ones((num_sequences, horizon), bool)


def spans(space, target_X):
    """Between the two levels around each target."""
    gaps = []
    for axis, target in zip(space.axes, target_X, strict=True):
        low, high, _ = schedules.mix(axis, target)
        gaps.append(axis.cost(axis.levels[high]) - axis.cost(axis.levels[low]))
    return np.array(gaps)


@given(problems())
def test_fixed_meets_its_target(problem):
    space, target_X, N, T = problem
    cost_NxTxX = space.costs_AxX[schedules.fixed(space, target_X, every(N, T))].astype(float)
    span_X = spans(space, target_X)
    assert np.all(np.abs(cost_NxTxX.mean(1) - target_X) <= span_X / T + 1e-6)  # in every sequence
    assert np.all(np.abs(cost_NxTxX.mean((0, 1)) - target_X) <= span_X / (N * T) + 1e-6)  # and over all


@given(problems(), st.integers(0, 3))
@settings(deadline=None)
def test_front_has_the_counts_of_fixed_in_descending_order(problem, uncontrolled):
    """After the steps that may not be controlled, which are dense."""
    space, target_X, N, T = problem
    may_NxT = np.tile(np.arange(T) >= uncontrolled, (N, 1))
    action_NxT, fixed_NxT = (make(space, target_X, may_NxT) for make in (schedules.front, schedules.fixed))
    assert np.all(action_NxT[:, :uncontrolled] == space.dense)
    cost, same = (space.costs_AxX[a][:, uncontrolled:] for a in (action_NxT, fixed_NxT))
    np.testing.assert_array_equal(cost, -np.sort(-same, 1))


@given(problems(), st.randoms(use_true_random=False), st.integers(0, 3))
@settings(deadline=None)
def test_clock_meets_the_target_of_every_step(problem, rng, uncontrolled):
    """To one of the sequences, at the two levels around it; dense where steps may not be controlled."""
    space, target_X, N, T = problem
    target_TxX = np.stack([target_X * rng.uniform(0.5, 1.0) for _ in range(T)])
    may_NxT = np.tile(np.arange(T) >= uncontrolled, (N, 1))
    action_NxT = schedules.clock(space, target_TxX, may_NxT)
    assert action_NxT.shape == (N, T)
    assert np.all(action_NxT[:, :uncontrolled] == space.dense)
    for t in range(uncontrolled, T):
        for x, (axis, target) in enumerate(zip(space.axes, target_TxX[t], strict=True)):
            low, high, share = schedules.mix(axis, target)
            taken_N = space.values_AxX[action_NxT[:, t], x]
            assert set(taken_N) <= {np.float32(axis.levels[low]), np.float32(axis.levels[high])}
            if low != high:
                assert abs(np.mean(taken_N == np.float32(axis.levels[high])) - share) <= 1 / N + 1e-6


def test_clock_gives_no_sequence_all_the_high_levels():
    space, N, T = space_of(kappa=(0.0, 1.0)), 4, 64
    target_TxX = np.tile([0.5, 1.0, 1.0], (T, 1))
    cost_NxT = space.costs_AxX[schedules.clock(space, target_TxX, every(N, T))][..., 0]
    assert np.all(np.abs(cost_NxT.mean(1) - 0.5) < 0.1)


@given(problems(), st.integers(1, 4))
@settings(deadline=None)
def test_random_has_the_counts_of_fixed(problem, num_draws):
    space, target_X, N, T = problem
    action_NxRxT = schedules.random(space, target_X, every(N, T), num_draws, np.random.default_rng(0))
    assert action_NxRxT.shape == (N, num_draws, T)
    fixed_NxT = schedules.fixed(space, target_X, every(N, T))
    for x in range(len(space.axes)):
        drawn = np.sort(space.values_AxX[action_NxRxT][..., x], -1)
        static = np.sort(space.values_AxX[fixed_NxT][..., x], -1)
        np.testing.assert_array_equal(drawn, np.broadcast_to(static[:, None], drawn.shape))


def test_mix_by_hand():
    axis = space_of(kappa=(0.1, 0.4, 1.0)).axes[0]
    assert schedules.mix(axis, 0.1) == (0, 0, 0.0)
    assert schedules.mix(axis, 0.4) == (1, 1, 0.0)
    assert schedules.mix(axis, 1.0) == (2, 2, 0.0)
    low, high, share = schedules.mix(axis, 0.85)
    assert (low, high) == (1, 2)
    assert share == pytest.approx(0.75)


def test_of_levels_that_cost_the_same_the_highest_is_played():
    """In bytes all bits cost the same, and of the cache all that is read in whole lines."""
    tied = dataclasses.replace(space_of(kappa=(0.1, 0.2, 0.4, 1.0)).axes[0], level_costs=(0.5, 0.5, 1.0, 1.0))
    assert schedules.mix(tied, 1.0) == (3, 3, 0.0)
    assert schedules.mix(tied, 0.5) == (1, 1, 0.0)
    assert schedules.mix(tied, 0.2) == (1, 1, 0.0)
    assert schedules.mix(tied, 0.75) == (1, 3, 0.5)


@pytest.mark.parametrize(("target", "level"), [(0.05, 0.1), (-3.0, 0.1), (1.2, 1.0)])
def test_beyond_the_ends_is_the_end(target, level):
    space = space_of()
    action_NxT = schedules.fixed(space, np.array([target, 1.0, 1.0]), every(3, 5))
    np.testing.assert_allclose(space.values_AxX[action_NxT][..., 0], level)


def test_an_axis_of_one_level_stays_at_it():
    space = space_of(rho=(1.0,))
    for target in (0.2, 1.0):
        action = schedules.random(
            space, np.array([0.5, target, 0.6]), every(2, 4), 3, np.random.default_rng(0)
        )
        assert np.all(space.values_AxX[action][..., 1] == 1.0)


def test_dense_is_the_top_of_every_axis():
    space = space_of()
    np.testing.assert_array_equal(space.costs_AxX[schedules.dense(space, 2, 3)], np.ones((2, 3, 3)))


def test_draws_differ_and_repeat_with_the_seed():
    space, target_X = space_of(), np.array([0.55, 0.8, 0.6])
    draw = lambda seed: schedules.random(space, target_X, every(4, 16), 8, np.random.default_rng(seed))
    np.testing.assert_array_equal(draw(0), draw(0))
    assert np.any(draw(0) != draw(1))
    assert len({row.tobytes() for row in draw(0).reshape(-1, 16)}) == 32


def test_the_higher_level_is_spread_evenly():
    space = space_of(kappa=(0.1, 1.0), rho=(1.0,), bits=(16.0,))
    high_T = space.values_AxX[schedules.fixed(space, np.array([0.4, 1.0, 1.0]), every(1, 30))][0, :, 0] == 1.0
    assert high_T.sum() == 10
    assert set(np.diff(np.flatnonzero(high_T))) == {3}


@st.composite
def masks(draw, N, T):
    """Sequences of which the first few steps are not controllable."""
    forced_N = np.array([draw(st.integers(0, T - 1)) for _ in range(N)])
    return np.arange(T) >= forced_N[:, None]


@given(problems(), st.data())
@settings(deadline=None)
def test_steps_that_are_not_controlled_are_dense_and_count_for_nothing(problem, data):
    space, target_X, N, T = problem
    mask_NxT = data.draw(masks(N, T))
    rng = np.random.default_rng(0)
    fixed_NxT = schedules.fixed(space, target_X, mask_NxT)
    official_NxT = schedules.fixed_official(space, target_X, mask_NxT, 3)
    random_NxRxT = schedules.random(space, target_X, mask_NxT, 2, rng)
    for action_NxT in (fixed_NxT, official_NxT, random_NxRxT[:, 0], random_NxRxT[:, 1]):
        assert np.all(action_NxT[~mask_NxT] == space.dense)
    span_X, cost = spans(space, target_X), space.costs_AxX.astype(float)
    for action_NxT in (fixed_NxT, random_NxRxT[:, 1]):
        assert np.all(np.abs(cost[action_NxT[mask_NxT]].mean(0) - target_X) <= span_X / mask_NxT.sum() + 1e-6)
    # Running averages over the whole text: rho and eta end within one row of a step.
    miss_X = np.abs(cost[official_NxT[mask_NxT]].mean(0) - target_X)
    assert np.all(miss_X[1:] <= span_X[1:] / mask_NxT.sum() + 1e-6)


def test_controllable_steps_by_hand():
    """Five tokens of prefix: the sixth and seventh key come with the first two steps."""
    shape = EpisodeConfig(prefix_len=5, horizon=4, episodes_per_prefix=2, sinks=4, window=2)
    first, second = [False, False, True, True], [True] * 4
    np.testing.assert_array_equal(schedules.controllable(shape, 2), [first, second, first, second])


def test_the_official_schedule_of_one_row_is_all_or_nothing():
    """kappa is mixed over rows alone: less than half of one row is none of it, for ever."""
    space = space_of()
    for target, level in ((0.54, 0.1), (0.56, 1.0)):
        action_NxT = schedules.fixed_official(space, np.array([target, 1.0, 1.0]), every(6, 8), 1)
        np.testing.assert_allclose(space.values_AxX[action_NxT][..., 0], level)


def test_the_official_schedule_by_hand():
    """Four rows, a quarter high: one row at a time, moving on by one; rho starts 17 steps further."""
    space = space_of(rho=(0.4, 1.0), bits=(16.0,))
    action_NxT = schedules.fixed_official(space, np.array([0.325, 0.55, 1.0]), every(4, 3), 4)
    kappa_NxT, rho_NxT, _ = np.moveaxis(space.values_AxX[action_NxT], -1, 0)
    np.testing.assert_array_equal(kappa_NxT == 1, np.eye(4, 3, dtype=bool))
    np.testing.assert_array_equal(rho_NxT == 1, np.roll(np.eye(4, dtype=bool), 1, 0)[:, :3])


def test_rounded_counts_are_the_same_in_every_sequence():
    space, target_X = space_of(rho=(1.0,), bits=(16.0,)), np.array([0.325, 1.0, 1.0])
    counts = {}
    for rounded in (False, True):
        action = schedules.random(space, target_X, every(8, 6), 1, np.random.default_rng(0), rounded)
        counts[rounded] = (space.values_AxX[action][:, 0, :, 0] == 1).sum(1)
    assert set(counts[True]) == {2}  # a quarter of 6 is 1.5: rounds to even
    assert set(counts[False]) == {1, 2}
    assert counts[False].sum() == 12


def test_held_dense_changes_its_axis_only():
    space = space_of()
    held_A = schedules.held_dense(space, "rho")
    np.testing.assert_array_equal(space.values_AxX[held_A][:, 1], 1.0)
    np.testing.assert_array_equal(space.values_AxX[held_A][:, [0, 2]], space.values_AxX[:, [0, 2]])
    with pytest.raises(ValueError, match=r"no axis 'tau'.*kappa, rho, eta"):
        schedules.held_dense(space, "tau")


# --- one budget for all axes ---------------------------------------------------------------------------


def test_the_best_mix_by_hand():
    """The first axis' first step saves 0.25 for 0.01, its second as much for 0.2; the other's 0.4 for 0.1."""
    loss = [np.array([0.21, 0.01, 0.0]), np.array([0.1, 0.0])]
    cost = [np.array([0.0, 0.5, 1.0]), np.array([0.2, 1.0])]
    wanted = {
        1.0: (1.0, 1.0),
        0.75: (0.5, 1.0),
        0.55: (0.5, 0.6),
        0.35: (0.5, 0.2),
        0.1: (0.0, 0.2),
        0.0: (0.0, 0.2),
    }
    for total, mixed in wanted.items():
        np.testing.assert_allclose(schedules.best_mix(loss, cost, (0.5, 0.5), total), mixed, atol=1e-9)


@st.composite
def losses_and_costs(draw):
    losses, costs, shares = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(1, 6))
        costs.append(
            np.array(sorted(draw(st.lists(st.integers(1, 20), min_size=n, max_size=n, unique=True)))) / 20
        )
        steps = draw(st.lists(st.integers(0, 100), min_size=n, max_size=n))
        losses.append(np.flip(np.cumsum(steps)) / 100.0)
        shares.append(draw(st.integers(0, 10)) / 10)
    return losses, costs, shares, draw(st.floats(0, 1))


@given(losses_and_costs())
@settings(max_examples=100)
def test_no_mix_of_the_same_total_loses_less(problem):
    """Against a linear program over the shares of steps at each level."""
    losses, costs, shares, part = problem
    least = 1 - sum(s * (1 - c[0]) for s, c in zip(shares, costs, strict=True))
    most = 1 - sum(s * (1 - c[-1]) for s, c in zip(shares, costs, strict=True))
    total = least + part * (most - least)
    found = schedules.best_mix(losses, costs, shares, total)
    reached = 1 - sum(s * (1 - c) for s, c in zip(shares, found, strict=True))
    assert reached == pytest.approx(total, abs=1e-6)
    paid = np.concatenate([s * c for s, c in zip(shares, costs, strict=True)])
    sizes = [len(c) for c in costs]
    one_each = np.repeat(np.eye(len(costs)), sizes, axis=1)
    solved = linprog(
        np.concatenate(losses),
        A_eq=np.vstack([one_each, paid]),
        b_eq=[*np.ones(len(costs)), total - 1 + sum(shares)],
    )
    assert solved.success
    mixed = sum(_least_loss(c, v, target) for c, v, target in zip(costs, losses, found, strict=True))
    assert mixed == pytest.approx(solved.fun, abs=1e-6)


def _least_loss(cost_n, loss_n, target):
    """The least that any two levels lose when they are mixed to a mean cost."""
    best = np.inf
    for i, j in np.ndindex(len(cost_n), len(cost_n)):
        low, high = cost_n[i], cost_n[j]
        if low - 1e-9 <= target <= high + 1e-9:
            share = (target - low) / (high - low) if high > low else 0.0
            best = min(best, (1 - share) * loss_n[i] + share * loss_n[j])
    return best
