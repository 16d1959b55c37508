"""Predicted losses, the prices that budgets become, and the actions that follow: by hand, by properties."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sol_jax.rl import loss_head
from sol_jax.rl.config import PolicyConfig
from sol_jax.rl.policy import Policy, PolicySpec, example_observation, initial_carry

COSTS = ((0.1, 0.5, 1.0), (1.0,), (0.25, 1.0))
SPEC = PolicySpec(
    hidden_size=6,
    num_actions=6,
    horizon=4,
    config=PolicyConfig(d_model=8, num_heads=2, predict_losses=True),
    level_costs=COSTS,
)


def test_losses_by_hand():
    """Scores of a rest, two steps of an axis of three levels, none of one level, one step of two."""
    wanted = np.log([0.5, 0.3, 0.2, 0.7]) + 4.0
    rest, (first, single, last) = loss_head.split_losses(jnp.asarray(wanted), (3, 1, 2))
    assert rest == pytest.approx(0.5)
    np.testing.assert_allclose(first, [0.5, 0.2, 0.0], rtol=1e-5)
    np.testing.assert_allclose(single, [0.0])
    np.testing.assert_allclose(last, [0.7, 0.0], rtol=1e-5)
    assert loss_head.num_scores((3, 1, 2)) == 4


@hypothesis.given(arrays.arrays(np.float32, (5, 7), elements=st.floats(-8, 8, width=32)))
@hypothesis.settings(deadline=None, max_examples=25)
def test_losses_fall_towards_the_dearest_level_and_are_zero_there(scores):
    rest, losses = loss_head.split_losses(jnp.asarray(scores), (4, 2, 3))
    assert np.all(rest > 0)
    for loss in losses:
        assert np.all(np.diff(loss, axis=-1) <= 0)
        assert np.all(loss[..., -1] == 0)


def alike(count):
    """So many steps that count the same at every price."""
    return jnp.ones((count, len(loss_head.PRICES_M)))


def test_mean_costs_fall_with_the_price_and_give_it_back():
    rng = np.random.default_rng(0)
    steps = rng.exponential(0.1, (4000, 9))
    loss_Nxn = np.concatenate([np.cumsum(steps[:, ::-1], 1)[:, ::-1], np.zeros((4000, 1))], 1)
    cost_n = jnp.linspace(0.1, 1.0, 10)
    cost_M = loss_head.mean_costs(jnp.asarray(loss_Nxn), cost_n, alike(4000))
    assert np.all(np.diff(cost_M) <= 1e-6)
    assert (cost_M[0], cost_M[-1]) == (pytest.approx(1.0, abs=1e-3), pytest.approx(0.1, abs=1e-3))
    for asked in (0.2, 0.35, 0.5, 0.8):
        price = loss_head.price_for(jnp.float32(asked), cost_M)
        spent = np.asarray(cost_n)[np.argmin(loss_Nxn + float(price) * np.asarray(cost_n), -1)].mean()
        assert spent == pytest.approx(asked, abs=0.01)


def test_mean_costs_by_hand():
    """Two steps, losses 0.3 and 0.03 more at half the cost: prices between 0.06 and 0.6 part them."""
    cost_M = loss_head.mean_costs(jnp.array([[0.3, 0.0], [0.03, 0.0]]), jnp.array([0.5, 1.0]), alike(2))
    prices = loss_head.PRICES_M
    wanted = np.where(prices < 0.06, 1.0, np.where(prices < 0.6, 0.75, 0.5))
    np.testing.assert_allclose(cost_M, wanted)


def test_mean_costs_of_weighted_steps_by_hand():
    """The same two steps, the second three times as heavy at low prices; no table rises with the price."""
    near_NxM = np.ones((2, len(loss_head.PRICES_M)))
    near_NxM[1, loss_head.PRICES_M < 0.3] = 3.0
    loss_Nxn, cost_n = jnp.array([[0.3, 0.0], [0.03, 0.0]]), jnp.array([0.5, 1.0])
    cost_M = loss_head.mean_costs(loss_Nxn, cost_n, jnp.asarray(near_NxM))
    prices = loss_head.PRICES_M
    wanted = np.where(prices < 0.06, 1.0, np.where(prices < 0.6, 0.625, 0.5))
    np.testing.assert_allclose(cost_M, wanted, rtol=1e-6)  # 0.75 between 0.3 and 0.6, but for the rise


def test_steps_count_where_about_as_much_was_asked_for():
    near_NxM = loss_head.nearness(jnp.array([0.5, 0.9]), jnp.array([1.0, 0.9, 0.5, 0.3]))
    np.testing.assert_allclose(near_NxM[0], np.exp([-12.5, -8.0, 0.0, -2.0]), atol=2e-6)
    np.testing.assert_allclose(near_NxM[1], np.exp([-0.5, 0.0, -8.0, -18.0]), atol=2e-6)
    assert np.all(near_NxM > 0)


@pytest.fixture(scope="module")
def policy():
    net = Policy(SPEC)
    example = example_observation(SPEC), initial_carry(SPEC)
    params = jax.jit(functools.partial(net.init, method="step"))(jax.random.key(0), *example)
    return net, params


def seen(rng, asked):
    like = example_observation(SPEC)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), like)
    return drawn._replace(prev_action=like.prev_action, num_keys=like.num_keys, target=jnp.array(asked))


def test_the_likeliest_action_has_the_least_loss_plus_price_times_cost(policy):
    net, params = policy
    rng = np.random.default_rng(1)
    table_XxM = params["prices"]["cost"]
    step = jax.jit(functools.partial(net.apply, params, method="step"))
    predict = jax.jit(functools.partial(net.apply, params, method="losses"))
    for _ in range(20):
        obs = seen(rng, rng.uniform(0.3, 1.0, 3).astype(np.float32))
        logits_A, _ = step(obs, initial_carry(SPEC))
        obs_1 = jax.tree.map(lambda leaf: leaf[None], obs)
        _, losses = predict(obs_1)
        prices = [float(loss_head.price_for(obs.target[x], table_XxM[x])) for x in range(3)]
        value = [np.asarray(loss[0]) + prices[x] * np.array(COSTS[x]) for x, loss in enumerate(losses)]
        joint = (value[0][:, None, None] + value[1][:, None] + value[2]).reshape(-1)
        assert np.argmax(logits_A) == np.argmin(joint)
        np.testing.assert_allclose(
            np.diff(logits_A), -np.diff(joint) / loss_head.SOFTNESS, rtol=1e-3, atol=1e-3
        )


def test_what_is_asked_for_moves_prices_and_no_prediction(policy):
    net, params = policy
    rng = np.random.default_rng(2)
    low = seen(rng, np.full(3, 0.3, np.float32))
    high = low._replace(target=low.target + 0.5)
    spent = low._replace(gap=low.gap + 0.5, prev_action=jnp.int32(1), target=low.target)
    same = spent._replace(target=spent.target + 0.5, gap=spent.gap - 0.5)

    @jax.jit
    def losses(obs):
        return jnp.concatenate(net.apply(params, jax.tree.map(lambda x: x[None], obs), method="losses")[1], 1)

    np.testing.assert_array_equal(losses(low), losses(high))
    np.testing.assert_allclose(losses(spent), losses(same), rtol=1e-5)
    assert np.abs(losses(low) - losses(spent)).max() > 1e-6  # but what was spent so far is seen


# What a unit of each axis' cost is of a whole step; the second axis has one level and saves nothing.
SHARES = (0.2, 0.0, 0.4)


def test_the_cost_of_a_step_by_hand():
    """Half of the first axis and a quarter of the last: 1 - 0.2 * 0.5 - 0.4 * 0.75."""
    cost = loss_head.total_cost(jnp.array([[0.5, 1.0, 0.25], [1.0, 1.0, 1.0]]), jnp.array(SHARES))
    np.testing.assert_allclose(cost, [0.6, 1.0], rtol=1e-6)


@pytest.mark.parametrize("asked", [0.55, 0.7, 0.9])
def test_one_price_for_all_axes_makes_steps_cost_what_was_asked(asked):
    """Each axis pays its share of the price; the total is met on the steps that the tables are of."""
    rng = np.random.default_rng(4)
    costs = [np.linspace(0.1, 1.0, 10), np.ones(1), np.linspace(0.25, 1.0, 7)]
    losses = [np.sort(rng.exponential(0.1, (4000, len(c))), 1)[:, ::-1] * (1.0 - c) for c in costs]
    table = jnp.stack(
        [
            loss_head.mean_costs(jnp.asarray(v), jnp.asarray(c), alike(4000))
            for v, c in zip(losses, costs, strict=True)
        ]
    )
    price = float(loss_head.shared_price(jnp.float32(asked), table, jnp.array(SHARES)))
    spent = [
        c[np.argmin(v + price * s * c, -1)].mean() for v, c, s in zip(losses, costs, SHARES, strict=True)
    ]
    assert loss_head.total_cost(np.array(spent), np.array(SHARES)) == pytest.approx(asked, abs=0.01)


def test_with_one_budget_the_likeliest_action_pays_one_price(policy):
    _, params = policy
    config = dataclasses.replace(SPEC.config, one_budget="bytes")
    net = Policy(dataclasses.replace(SPEC, config=config, axis_shares=SHARES))
    step = jax.jit(functools.partial(net.apply, params, method="step"))
    predict = jax.jit(functools.partial(net.apply, params, method="losses"))
    rng = np.random.default_rng(5)
    for _ in range(10):
        obs = seen(rng, rng.uniform(0.3, 1.0, 3).astype(np.float32))
        logits_A, _ = step(obs, initial_carry(SPEC))
        total = loss_head.total_cost(obs.target, jnp.array(SHARES))
        price = float(loss_head.shared_price(total, params["prices"]["cost"], jnp.array(SHARES)))
        _, losses = predict(jax.tree.map(lambda leaf: leaf[None], obs))
        value = [
            np.asarray(v[0]) + price * s * np.array(c) for v, s, c in zip(losses, SHARES, COSTS, strict=True)
        ]
        joint = (value[0][:, None, None] + value[1][:, None] + value[2]).reshape(-1)
        np.testing.assert_allclose(
            np.diff(logits_A), -np.diff(joint) / loss_head.SOFTNESS, rtol=1e-3, atol=1e-3
        )


def test_one_budget_is_restated_as_a_whole(policy):
    """Axes may be off their own targets as long as the step is not; what is left is left of the whole."""
    _, params = policy
    config = dataclasses.replace(SPEC.config, one_budget="net", restate=True)
    net = Policy(dataclasses.replace(SPEC, config=config, axis_shares=(0.3, 0.3, 0.4)))
    step = jax.jit(functools.partial(net.apply, params, method="step"))
    obs = seen(np.random.default_rng(6), np.full(3, 0.6, np.float32))._replace(progress=jnp.float32(0.75))
    obs = obs._replace(prev_action=jnp.int32(1), gap=jnp.zeros(3))
    traded = obs._replace(gap=jnp.array([0.4, 0.0, -0.3]))  # 0.3 * 0.4 = 0.4 * 0.3
    other_split = obs._replace(target=obs.target + traded.gap, gap=jnp.zeros(3))
    prices = [step(o, initial_carry(SPEC))[0] for o in (obs, other_split)]
    np.testing.assert_allclose(*prices, rtol=1e-3, atol=1e-3)


def test_a_spec_says_what_its_budget_is_a_share_of():
    with pytest.raises(ValueError, match="axis_shares of 0 axes, and one_budget is 'net'"):
        dataclasses.replace(SPEC, config=dataclasses.replace(SPEC.config, one_budget="net"))


def test_prices_get_no_gradient(policy):
    net, params = policy
    obs = seen(np.random.default_rng(3), np.full(3, 0.6, np.float32))

    def value(params):
        return net.apply(params, obs, initial_carry(SPEC), method="step")[0][2]

    grads = jax.jit(jax.grad(value))(params)
    assert np.all(grads["prices"]["cost"] == 0)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads["params"])) > 0
