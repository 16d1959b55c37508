"""Fixed and random schedules meet their targets, whatever the targets, levels and sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sol_jax import schedules
from sol_jax.axes import ActionSpace, ChannelPruning, OutputQuantization, Quest


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


def spans(space, target_X):
    """Between the two levels around each target."""
    gaps = []
    for axis, target in zip(space.axes, target_X, strict=True):
        low, high, _ = schedules.mix(axis, target)
        gaps.append(axis.cost(axis.levels[high]) - axis.cost(axis.levels[low]))
    return np.array(gaps)


@given(problems())
@settings(deadline=None)
def test_fixed_meets_its_target(problem):
    space, target_X, N, T = problem
    cost_NxTxX = space.costs_AxX[schedules.fixed(space, target_X, N, T)].astype(float)
    span_X = spans(space, target_X)
    assert np.all(np.abs(cost_NxTxX.mean(1) - target_X) <= span_X / T + 1e-6)  # in every sequence
    assert np.all(np.abs(cost_NxTxX.mean((0, 1)) - target_X) <= span_X / (N * T) + 1e-6)  # and over all


@given(problems(), st.integers(1, 4))
@settings(deadline=None)
def test_random_has_the_counts_of_fixed(problem, num_draws):
    space, target_X, N, T = problem
    action_NxRxT = schedules.random(space, target_X, N, T, num_draws, np.random.default_rng(0))
    assert action_NxRxT.shape == (N, num_draws, T)
    fixed_NxT = schedules.fixed(space, target_X, N, T)
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


@pytest.mark.parametrize(("target", "level"), [(0.05, 0.1), (-3.0, 0.1), (1.2, 1.0)])
def test_beyond_the_ends_is_the_end(target, level):
    space = space_of()
    action_NxT = schedules.fixed(space, np.array([target, 1.0, 1.0]), 3, 5)
    np.testing.assert_allclose(space.values_AxX[action_NxT][..., 0], level)


def test_an_axis_of_one_level_stays_at_it():
    space = space_of(rho=(1.0,))
    for target in (0.2, 1.0):
        action = schedules.random(space, np.array([0.5, target, 0.6]), 2, 4, 3, np.random.default_rng(0))
        assert np.all(space.values_AxX[action][..., 1] == 1.0)


def test_dense_is_the_top_of_every_axis():
    space = space_of()
    np.testing.assert_array_equal(space.costs_AxX[schedules.dense(space, 2, 3)], np.ones((2, 3, 3)))


def test_draws_differ_and_repeat_with_the_seed():
    space, target_X = space_of(), np.array([0.55, 0.8, 0.6])
    draw = lambda seed: schedules.random(space, target_X, 4, 16, 8, np.random.default_rng(seed))  # noqa: E731
    np.testing.assert_array_equal(draw(0), draw(0))
    assert np.any(draw(0) != draw(1))
    assert len({row.tobytes() for row in draw(0).reshape(-1, 16)}) == 32


def test_the_higher_level_is_spread_evenly():
    space = space_of(kappa=(0.1, 1.0), rho=(1.0,), bits=(16.0,))
    high_T = space.values_AxX[schedules.fixed(space, np.array([0.4, 1.0, 1.0]), 1, 30)][0, :, 0] == 1.0
    assert high_T.sum() == 10
    assert set(np.diff(np.flatnonzero(high_T))) == {3}
