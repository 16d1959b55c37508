"""Heuristics by hand, their budgets, and what each signal does to the choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sol_jax.axes.base import ActionSpace
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.baselines import heuristics
from sol_jax.rl.policy import Observation, budget_gap, progress

SPACE = ActionSpace(
    (
        Quest((0.1, 0.4, 1.0), (0.1, 1.0), 100.0),
        ChannelPruning((0.4, 0.7, 1.0), (0.4, 1.0), 100.0),
        OutputQuantization((5.0, 8.0, 16.0), (0.3125, 1.0), 200.0),
    )
)
D = 6


def choose(cost_L, required, remaining=8, signal=0.5, due=None):
    due = required * remaining if due is None else due
    args = (jnp.asarray(cost_L, jnp.float32), *map(jnp.float32, (required, due, remaining, signal)))
    return int(heuristics.choose_level(*args))


def test_the_choice_by_hand():
    """0.7 is half of the way from 0.4 to 1: the signal decides."""
    levels = (0.1, 0.4, 1.0)
    assert choose(levels, 0.69) == 1
    assert choose(levels, 0.71) == 2
    assert choose(levels, 0.60, signal=1.0) == 2  # 1/3 + 0.35/2 = 0.508
    assert choose(levels, 0.58, signal=1.0) == 1  # 0.3 + 0.175 = 0.475
    assert choose(levels, 0.80, signal=0.0) == 1  # 2/3 - 0.175 = 0.492
    assert choose(levels, 0.81, signal=0.0) == 2
    assert choose(levels, 0.1) == 0
    assert choose(levels, 1.0) == 2
    assert choose((1.0,), 0.3) == 0
    tied = (0.5, 0.5, 1.0, 1.0)  # of levels that cost the same the highest
    assert [choose(tied, cost) for cost in (0.2, 0.5, 0.7, 0.8, 1.0)] == [1, 1, 1, 3, 3]


def test_the_last_step_takes_what_is_due():
    """Whatever the signal: of one remaining step the levels next to the sum are all that can meet it."""
    levels = (0.1, 0.4, 1.0)
    for signal in (0.0, 1.0):
        assert choose(levels, 1.0, remaining=1, signal=signal) == 2
        assert choose(levels, 0.1, remaining=1, signal=signal) == 0
        # Two steps that owe 1.9: the first must be 1 (0.4 + 1 falls short).
        assert choose(levels, 0.95, remaining=2, signal=signal, due=1.9) == 2


def play(controller, hidden_TxD, embed_TxD, target_X, forced=0):
    """The actions of a controller that sees these states, without a model."""
    costs, T = SPACE.costs_AxX, len(hidden_TxD)
    memory, spent_X, counted, actions = controller.memory, np.zeros(3), 0, []
    for t in range(T):
        is_controllable = t >= forced
        seen = Observation(
            hidden=hidden_TxD[t],
            embed=embed_TxD[t],
            progress=progress(t, T),
            controllable=jnp.float32(is_controllable),
            target=jnp.float32(target_X),
            gap=budget_gap(spent_X, counted, target_X),
            prev_action=jnp.int32(0),
            num_keys=jnp.int32(t + 1),
            logit=jnp.float32(0.0),
        )
        action, _, memory = controller.act(jax.random.key(0), seen, memory)
        actions.append(int(action) if is_controllable else SPACE.dense)
        spent_X, counted = spent_X + is_controllable * costs[actions[-1]], counted + is_controllable
    return np.array(actions)


def states(T, seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=(T, D)), jnp.float32) for _ in range(2))


@given(
    st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=20)
def test_budgets_are_met_up_to_a_level(shares, T, official, forced):
    """And the steps that may not be controlled count for nothing."""
    low_X, high_X = SPACE.costs_AxX[0], SPACE.costs_AxX[-1]
    target_X = low_X + np.array(shares) * (high_X - low_X)
    forced = min(forced, T - 1)
    controller = heuristics.drift_controller(SPACE, T, jnp.ones(D), official)
    actions = play(controller, *states(T), target_X, forced)[forced:]
    gap_X = np.array([np.diff([axis.cost(level) for level in axis.levels]).max() for axis in SPACE.axes])
    assert np.all(np.abs(SPACE.costs_AxX[actions].mean(0) - target_X) <= gap_X / (T - forced) + 1e-5)


def test_drift_by_hand():
    a, b = jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])
    for other, intended, official in ((a, 0.0, 0.0), (b, 0.5, 0.5), (-3 * a, 1.0, 0.5)):
        assert float(heuristics.drift(a, other)) == pytest.approx(intended, abs=1e-6)
        assert float(heuristics.drift_official(a, other)) == pytest.approx(official, abs=1e-6)
    assert float(heuristics.drift(a, 0 * a)) == 0.5  # no direction: as good as orthogonal, not NaN


def test_the_official_drift_never_pushes_up():
    """With opposite states at every step theirs chooses as without a signal, the intended one higher."""
    T, target_X = 9, np.array([0.6, 0.8, 0.7])
    hidden_TxD = jnp.asarray(np.outer((-1.0) ** np.arange(T), np.ones(D)), jnp.float32)
    first = {}
    for official in (False, True):
        controller = heuristics.drift_controller(SPACE, T, hidden_TxD[0], official)
        actions = play(controller, hidden_TxD, -hidden_TxD, target_X)
        first[official] = SPACE.costs_AxX[actions[0]]
    neutral = [choose([a.cost(x) for x in a.levels], c, T) for a, c in zip(SPACE.axes, target_X, strict=True)]
    np.testing.assert_allclose(first[True], SPACE.costs_AxX[int(SPACE.join(np.array(neutral)))])
    assert np.all(first[False] >= first[True])
    assert np.any(first[False] > first[True])


def test_drift_starts_from_the_embeddings():
    """Step 0 compares embeddings, step 1 the first decoded state with the prefix' last, then states."""
    rng = np.random.default_rng(0)
    hidden_TxD, embed_TxD = states(4)
    last_D = jnp.asarray(rng.normal(size=D), jnp.float32)
    controller = heuristics.drift_controller(SPACE, 4, last_D)
    seen_by = []

    def record(now_D, before_D):
        seen_by.append((np.asarray(now_D), np.asarray(before_D)))
        return jnp.float32(0.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heuristics, "drift", record)
        controller = heuristics.drift_controller(SPACE, 4, last_D)
        play(controller, hidden_TxD, embed_TxD, np.array([0.5, 0.7, 0.6]))
    expected = [(embed_TxD[0], last_D), *((hidden_TxD[t], hidden_TxD[t - 1]) for t in range(1, 4))]
    for found, wanted in zip(seen_by, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_entropy_by_hand():
    assert float(heuristics.normalized_entropy(jnp.zeros(7))) == pytest.approx(1.0)
    assert float(heuristics.normalized_entropy(jnp.array([100.0, 0.0, 0.0]))) == pytest.approx(0.0, abs=1e-6)
    two_of_four = jnp.array([0.0, 0.0, -jnp.inf, -jnp.inf])
    assert float(heuristics.normalized_entropy(jnp.maximum(two_of_four, -1e9))) == pytest.approx(0.5)


def test_entropy_spends_where_the_model_is_unsure():
    """Two tokens: a state of large norm predicts one of them surely, the zero state neither."""
    weights = {"embed": jnp.eye(2, D), "final_norm": jnp.ones(D)}
    sure, unsure = 50.0 * jnp.eye(1, D)[0], jnp.zeros(D)
    target_X, taken = np.array([0.7, 0.85, 0.75]), {}
    for name, state in (("sure", sure), ("unsure", unsure)):
        controller = heuristics.entropy_controller(weights, SPACE, 6)
        hidden_TxD = jnp.broadcast_to(state, (6, D))
        taken[name] = SPACE.costs_AxX[play(controller, hidden_TxD, hidden_TxD, target_X)]
    assert np.all(taken["unsure"][0] >= taken["sure"][0])
    assert np.any(taken["unsure"][0] > taken["sure"][0])
    np.testing.assert_allclose(taken["unsure"].mean(0), target_X, atol=0.15)  # in the end both meet it
    np.testing.assert_allclose(taken["sure"].mean(0), target_X, atol=0.15)
