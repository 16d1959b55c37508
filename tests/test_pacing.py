"""Pacing: episodes on budget under any policy, and the distribution that a policy starts from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sol_jax.pacing import RULED_OUT, pacing_scores, restated
from sol_jax.policy import (
    Observation,
    Policy,
    PolicyConfig,
    example_observation,
    initial_carry,
    observation_scalars,
)

TWO = (0.1, 1.0)
MANY = tuple(k / 10 for k in range(1, 11))
UNEVEN = (0.3125, 0.4, 0.75, 1.0)


@functools.partial(jax.jit, static_argnames=("costs", "horizon"))
def scores_of(step, spent, target, costs, horizon, extra=0.0):
    """Scores of one axis before step `step`, `spent` so far, of a policy that answers `extra`."""
    scalars_N = observation_scalars(step, horizon, True, target[None], spent[None], step)
    return pacing_scores(jnp.full(1, extra), scalars_N, (costs,), horizon)


def play(extra_T, target, costs):
    """Mean cost of an episode whose policy answers `extra` and takes the best level."""
    spent, T = jnp.float32(0.0), len(extra_T)
    for t, extra in enumerate(extra_T):
        level = jnp.argmax(scores_of(t, spent, jnp.float32(target), costs, T, extra))
        spent = spent + jnp.float32(costs[int(level)])
    return float(spent) / T


@settings(max_examples=40, deadline=None)
@given(
    costs=st.sampled_from([TWO, MANY, UNEVEN]),
    share=st.floats(0, 1),
    T=st.sampled_from([4, 16]),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([0.0, 1.0, 1e6]),
)
def test_an_episode_ends_on_its_budget_under_any_policy(costs, share, T, seed, size):
    extra_T = size * np.random.default_rng(seed).standard_normal(T)
    target = costs[0] + share * (costs[-1] - costs[0])
    # Half the largest step between levels, of the whole episode.
    assert abs(play(extra_T, target, costs) - target) <= max(np.diff(costs)) / 2 / T + 1e-4


@pytest.mark.parametrize("end", [0, 1])
def test_a_policy_that_always_wants_one_end_gets_it_until_the_rest_must_be_the_other(end):
    target, T = 0.55, 16
    extra = 1e3 if end else -1e3  # the highest or the lowest level
    spent, levels = jnp.float32(0.0), []
    for t in range(T):
        level = int(jnp.argmax(scores_of(t, spent, jnp.float32(target), MANY, T, extra)))
        levels.append(level)
        spent = spent + MANY[level]
    # 16 * 0.55 = 8.8 = 8 * 1.0 + 8 * 0.1
    assert levels == ([9] * 8 + [0] * 8 if end else [0] * 8 + [9] * 8)


def test_only_levels_that_the_rest_can_make_up_for_remain():
    # Of 4 * 0.55 = 2.2 half is left for two steps: 1.1 less any level suits the last.
    scores_L = scores_of(2, jnp.float32(1.1), jnp.float32(0.55), MANY, 4)
    allowed = [cost for cost, score in zip(MANY, scores_L, strict=True) if score > RULED_OUT / 2]
    np.testing.assert_allclose(allowed, MANY)
    # With 0.7 left for two steps: 0.7 - c must be at least 0.1, less half a step of 0.1.
    scores_L = scores_of(2, jnp.float32(1.5), jnp.float32(0.55), MANY, 4)
    allowed = [cost for cost, score in zip(MANY, scores_L, strict=True) if score > RULED_OUT / 2]
    np.testing.assert_allclose(allowed, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    # The last step: 0.7 is left, and the levels within 0.05 of it are one.
    scores_L = scores_of(3, jnp.float32(1.5), jnp.float32(0.55), MANY, 4)
    assert [i for i, score in enumerate(scores_L) if score > RULED_OUT / 2] == [6]


def test_with_two_levels_the_odds_follow_what_is_left():
    """0.4 is left per step after one full step of four at 0.55, a third of the way from 0.1 to 1.0.

    Half the step between the levels is 0.45; -(0.6 / 0.45)^2 / 2 + (0.3 / 0.45)^2 / 2 = -2/3.
    """
    low, high = scores_of(1, jnp.float32(1.0), jnp.float32(0.55), TWO, 4)
    assert float(high - low) == pytest.approx(-2 / 3, abs=1e-4)


def test_the_likeliest_level_of_many_is_the_one_nearest_to_what_is_left():
    for target in (0.1, 0.21, 0.4, 0.58, 0.8, 1.0):
        scores_L = scores_of(0, jnp.float32(0.0), jnp.float32(target), MANY, 16)
        assert MANY[int(jnp.argmax(scores_L))] == pytest.approx(round(target, 1))


@pytest.mark.parametrize("target", [0.2, 0.45, 0.83])
def test_left_alone_it_spends_evenly(target):
    spent = jnp.float32(0.0)
    for t in range(16):
        level = int(jnp.argmax(scores_of(t, spent, jnp.float32(target), MANY, 16)))
        assert abs(MANY[level] - target) < 0.1
        spent = spent + MANY[level]


def test_an_axis_with_one_level_is_at_it_whatever_is_asked():
    np.testing.assert_array_equal(scores_of(3, jnp.float32(3.0), jnp.float32(0.4), (1.0,), 16), [0.0])


PACED = PolicyConfig(
    hidden_size=6, num_actions=20, horizon=4, num_axes=2, d_model=16, num_heads=2, paced_costs=(TWO, MANY)
)


def test_a_new_paced_policy_spends_evenly_on_every_axis():
    config = PACED
    example = example_observation(config)
    scalars_N = observation_scalars(1, 4, True, jnp.array([0.55, 0.55]), jnp.array([1.0, 0.6]), 1)
    seen = Observation(jnp.ones_like(example.hidden_D), example.embed_D, scalars_N, jnp.zeros((), jnp.int32))
    carry = initial_carry(config)
    params = Policy(config).init(jax.random.key(0), seen, carry, method="step")
    logits_A, _ = Policy(config).apply(params, seen, carry, method="step")
    # Left per step: (4 * 0.55 - 1.0) / 3 = 0.4 and (4 * 0.55 - 0.6) / 3 = 0.533; deviations 0.45 and 0.18.
    of_two = -np.square((np.array(TWO) - 0.4) / 0.45) / 2
    of_many = -np.square((np.array(MANY) - 1.6 / 3) / 0.18) / 2
    np.testing.assert_allclose(logits_A.reshape(2, 10), of_two[:, None] + of_many, atol=1e-3)


def test_costs_of_other_actions_are_refused():
    with pytest.raises(ValueError, match=r"paced_costs of \(2, 10\) levels are not those of 5 actions"):
        dataclasses.replace(PACED, num_actions=5)


def test_a_restated_target_is_what_is_left_per_step():
    """After two steps of four that cost 0.9 and 0.3 on average, 0.5 asked of both axes."""
    scalars_N = observation_scalars(2, 4, True, jnp.array([0.5, 0.5]), jnp.array([1.8, 0.6]), 2)
    seen = restated(scalars_N, 2, 4)
    np.testing.assert_allclose(seen, [*scalars_N[:2], (2.0 - 1.8) / 2, (2.0 - 0.6) / 2, 0, 0], atol=1e-6)
    # Before the first step nothing changes, and no more than all or less than nothing is asked for.
    first = observation_scalars(0, 4, True, jnp.array([0.5, 0.7]), jnp.zeros(2), 0)
    np.testing.assert_allclose(restated(first, 2, 4), first, atol=1e-6)
    late = observation_scalars(3, 4, True, jnp.array([0.2, 0.9]), jnp.array([1.8, 1.2]), 3)
    np.testing.assert_allclose(restated(late, 2, 4)[2:4], [0.0, 1.0])


def test_the_two_faces_of_a_policy_agree_when_targets_are_restated():
    config = PolicyConfig(hidden_size=6, num_actions=4, horizon=4, num_axes=2, d_model=16, num_heads=2)
    plain, asked = Policy(config), Policy(dataclasses.replace(config, restate=True))
    rng = np.random.default_rng(0)
    spent = np.cumsum(rng.uniform(size=(4, 2)), 0) - 0.3
    scalars = [observation_scalars(t, 4, True, jnp.full(2, 0.5), jnp.asarray(spent[t]), t) for t in range(4)]

    def seen(scalars_TxN):
        states = jnp.asarray(rng.normal(size=(4, 6)))
        return Observation(states, states, jnp.stack(scalars_TxN), jnp.zeros(4, jnp.int32))

    episode = seen(scalars)
    carry = initial_carry(config)
    first = jax.tree.map(lambda x: x[0], episode)
    params = plain.init(jax.random.key(0), first, carry, method="step")
    whole_TxA = asked.apply(params, episode)
    for t in range(4):
        step_A, carry = asked.apply(params, jax.tree.map(lambda x, t=t: x[t], episode), carry, method="step")
        np.testing.assert_allclose(step_A, whole_TxA[t], atol=1e-5)
    told = episode._replace(scalars_N=jnp.stack([restated(x, 2, 4) for x in scalars]))
    np.testing.assert_allclose(plain.apply(params, told), whole_TxA, atol=1e-5)
    assert jnp.abs(plain.apply(params, episode) - whole_TxA).max() > 1e-3
