"""Rewards: numbers worked out by hand, properties, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from sol_jax.rl import rewards

floats = st.floats(-4, 4, width=32)
reward_arrays = hnp.arrays(np.float32, st.integers(1, 6), elements=floats)
LESS = settings(max_examples=25)


def test_task_reward_mixes_likelihood_and_divergence():
    # (1 - 0.25) * -2 - 0.25 * 0.8
    np.testing.assert_allclose(rewards.task_reward(-2.0, 0.8, 0.25), -1.7, rtol=1e-6)
    assert rewards.task_reward(-2.0, 0.8, 0.0) == -2.0


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sum", [-2.5, -3.0, -2.0]),  # -2; -2 + 0.5 * -2; -1 + 0.5 * -3
        ("max", [-0.5, -1.0, -2.0]),  # -2; max(-2, -1); max(-1, -0.5)
        ("none", [-1.0, -2.0, -2.0]),
    ],
)
def test_returns_by_hand(how, expected):
    reward_T = jnp.array([-1.0, -2.0, -2.0])
    np.testing.assert_allclose(rewards.returns(reward_T, 0.5, how), expected)


@pytest.mark.parametrize(
    ("how", "expected"), [("sum", [-2.5] * 3), ("max", [-0.5] * 3), ("none", [-1, -2, -2])]
)
def test_outcome_gives_every_step_the_first_return(how, expected):
    reward_T = jnp.array([-1.0, -2.0, -2.0])
    np.testing.assert_allclose(rewards.returns(reward_T, 0.5, how, "outcome"), expected)


@LESS
@given(reward_arrays, st.floats(0, 1, width=32))
def test_returns_obey_their_recursions(reward_T, gamma):
    total_T = rewards.returns(reward_T, gamma, "sum")
    best_T = rewards.returns(reward_T, gamma, "max")
    for t in range(len(reward_T) - 1):
        np.testing.assert_allclose(total_T[t], reward_T[t] + gamma * total_T[t + 1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(best_T[t], max(reward_T[t], gamma * best_T[t + 1]), rtol=1e-5, atol=1e-5)
    assert total_T[-1] == best_T[-1] == reward_T[-1]


@pytest.mark.parametrize("how", ["sum", "max"])
def test_without_discount_weight_a_return_is_its_reward(how):
    reward_T = jnp.array([-3.0, 1.0, -2.0])
    expected = reward_T if how == "sum" else jnp.maximum(reward_T, jnp.array([0.0, 0.0, -jnp.inf]))
    np.testing.assert_array_equal(rewards.returns(reward_T, 0.0, how), expected)


def test_costs_count_controllable_steps_only():
    cost_TxX = jnp.array([[1.0, 1.0], [0.2, 0.4], [0.6, 0.8]])
    mean_X = rewards.axis_costs(cost_TxX, jnp.array([False, True, True]))
    np.testing.assert_allclose(mean_X, [0.4, 0.6], rtol=1e-6)
    np.testing.assert_array_equal(rewards.axis_costs(cost_TxX, jnp.zeros(3)), [0.0, 0.0])


def test_penalty_by_hand():
    # Gaps 0.12 over, 0.22 under and 0.01 over; less 0.02, squared, weighed.
    penalty_X = rewards.budget_penalty(
        jnp.array([0.52, 0.38, 0.71]), jnp.array([0.4, 0.6, 0.7]), jnp.array([100.0, 100.0, 200.0])
    )
    np.testing.assert_allclose(penalty_X, [1.0, 4.0, 0.0], rtol=1e-5)


def test_penalty_reads_weight_and_dead_zone():
    args = jnp.array([0.9]), jnp.array([0.5])
    np.testing.assert_array_equal(rewards.budget_penalty(*args, jnp.zeros(1)), [0.0])
    np.testing.assert_allclose(rewards.budget_penalty(*args, jnp.ones(1), dead_zone=0.1), [0.09], rtol=1e-5)


@LESS
@given(hnp.arrays(np.float32, 3, elements=st.floats(0, 1, width=32)), st.floats(0, 0.5, width=32))
def test_penalty_is_even_and_never_negative(gap_X, dead_zone):
    budget_X, weight_X = jnp.full(3, 0.5), jnp.array([1.0, 2.0, 3.0])
    over_X = rewards.budget_penalty(budget_X + gap_X, budget_X, weight_X, dead_zone)
    under_X = rewards.budget_penalty(budget_X - gap_X, budget_X, weight_X, dead_zone)
    np.testing.assert_allclose(over_X, under_X, rtol=1e-4, atol=1e-6)
    assert (over_X >= 0).all()
    assert (over_X[gap_X <= dead_zone - 1e-6] == 0).all()


def test_gradients_match_finite_differences():
    reward_T = jnp.array([-1.0, 0.7, -2.0, 0.3])
    for how in ("sum", "max"):
        check_grads(
            lambda r_T, how=how: rewards.returns(r_T, 0.85, how), (reward_T,), 1, rtol=1e-2, atol=1e-2
        )
    budget_X, weight_X = jnp.array([0.4, 0.6, 0.7]), jnp.array([1.0, 2.0, 3.0])

    def penalty(mean_X):
        return rewards.budget_penalty(mean_X, budget_X, weight_X)

    check_grads(penalty, (jnp.array([0.9, 0.2, 0.71]),), 1, rtol=1e-2, atol=1e-2)
    # Zero inside the dead zone and exactly on target, where |x| has no derivative.
    np.testing.assert_array_equal(jax.jacobian(penalty)(budget_X), jnp.zeros((3, 3)))


def test_nan_shows():
    reward_T = jnp.array([0.0, jnp.nan, 0.0])
    for how in ("sum", "max"):
        np.testing.assert_array_equal(jnp.isnan(rewards.returns(reward_T, 0.5, how)), [True, True, False])
    cost_TxX = jnp.array([[jnp.nan, 1.0], [0.5, 0.5]])
    mean_X = rewards.axis_costs(cost_TxX, jnp.array([False, True]))
    np.testing.assert_array_equal(jnp.isnan(mean_X), [True, False])
    assert jnp.isnan(rewards.budget_penalty(mean_X, jnp.ones(2), jnp.ones(2))[0])


def test_wrong_ranks_and_names_are_refused():
    with pytest.raises(ValueError, match="reward_T"):
        rewards.returns(jnp.zeros((2, 3)), 0.5)
    with pytest.raises(ValueError, match="controllable_T"):
        rewards.axis_costs(jnp.zeros((2, 3)), jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match="weight_X"):
        rewards.budget_penalty(jnp.zeros(3), jnp.zeros(3), 100.0)
    with pytest.raises(ValueError, match="how"):
        rewards.returns(jnp.zeros(3), 0.5, "mean")
    with pytest.raises(ValueError, match="level"):
        rewards.returns(jnp.zeros(3), 0.5, "sum", "both")


def test_batches_with_vmap():
    reward_BxT = jnp.arange(6.0).reshape(2, 3)
    batched = jax.jit(jax.vmap(lambda r_T: rewards.returns(r_T, 0.5)))(reward_BxT)
    np.testing.assert_allclose(batched[1], rewards.returns(reward_BxT[1], 0.5))
