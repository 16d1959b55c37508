"""The counterfactual learner: its schedules, what it takes for lost, what it learns, how it spends."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sol_jax.rl import counterfactual, loss_head
from sol_jax.rl.collect import prefill_blocks, run_schedules
from sol_jax.rl.policy import Policy, example_observation
from sol_jax.rl.rollout import Controller, dense_divergence, label_logp, policy_controller, replay
from sol_jax.rl.train_step import init_state, jit_train_step

collect_outcomes = jax.jit(counterfactual.collect_outcomes, static_argnames="setup")
recalibrated = jax.jit(counterfactual.recalibrated, static_argnames=("setup", "asked"))
FIELDS = {
    "learner": "counterfactual",
    "policy.predict_losses": True,
    "policy.normalize_inputs": True,
    "grpo.num_schedules": 5,
    "optim.accumulate": 1,
    "optim.passes": 2,
    "optim.learning_rate": 3e-3,
    "episode.episodes_per_prefix": 2,
    "axes.kappa.levels": (0.1, 0.4, 1.0),
}


@pytest.fixture(scope="module")
def learner(tiny_folder, tiny_session):
    config = tiny.config_for(tiny_folder, **FIELDS)
    setup = config.setup(tiny_session.setup.model)
    tokens = jax.random.randint(jax.random.key(5), (2, setup.episode.block_length), 0, tiny.VOCAB_SIZE)
    return setup, tiny_session.weights, tokens


@pytest.mark.parametrize("K", [2, 3, 5, 12])
def test_schedules_meet_every_level_as_often_and_in_any_order(learner, K):
    space = learner[0].space
    action = counterfactual.permuted_actions(jax.random.key(0), (4, 2, 6), K, space)
    assert action.shape == (4, 2, 6, K)
    level = np.stack(np.unravel_index(np.asarray(action), [len(axis.levels) for axis in space.axes]), -1)
    for x, axis in enumerate(space.axes):
        count = len(axis.levels)
        times = (level[..., x, None] == np.arange(count)).sum(-2)
        assert times.min() >= K // count
        assert times.max() <= -(-K // count)
        assert len({tuple(row) for row in level[..., x].reshape(-1, K)}) > 1
    # Axes are independent: schedules do not go through the levels of two of them in step.
    if K == 12:
        assert abs(np.corrcoef(level[..., 0].ravel(), level[..., 1].ravel())[0, 1]) < 0.2


def test_schedules_do_not_depend_on_each_other_s_place(learner):
    keys = [jax.random.key(n) for n in (1, 2)]
    first, second = (counterfactual.permuted_actions(k, (3, 2, 4), 5, learner[0].space) for k in keys)
    assert np.any(first != second)


@pytest.mark.parametrize("target", ["divergence", "label"])
def test_what_is_lost_step_by_step(learner, target, tiny_folder, tiny_session):
    setup, weights, tokens = learner
    config = tiny.config_for(tiny_folder, **FIELDS | {"counterfactual.target": target})
    setup = config.setup(tiny_session.setup.model)
    key = jax.random.key(3)
    schedules = counterfactual.draw_schedules(key, jnp.int32(0), len(tokens), setup)
    found = collect_outcomes(None, weights, tokens, schedules, None, setup)

    @jax.jit
    def played(weights, action):
        blocks = prefill_blocks(weights, tokens, setup, True)
        budget = jnp.zeros((*action.shape[:-1], 3))
        return blocks, run_schedules(weights, blocks, key, budget, replay(action), setup)

    blocks, rollout = played(weights, found.action)
    for b, w, k, t in ((0, 0, 0, 0), (1, 1, 4, 3), (0, 1, 2, 2)):
        hidden = rollout.hidden[b, w, k, t]
        if target == "divergence":
            wanted = dense_divergence(weights, blocks.dense_hidden[b, w, t], hidden)
        else:
            wanted = -label_logp(weights, hidden, blocks.episodes.label[b, w, t])
        assert found.loss[b, w, k, t] == pytest.approx(float(wanted), rel=1e-4, abs=1e-6)
    assert np.all(found.observation.target == 0)


def outcomes(weights, tokens, setup):
    schedules = counterfactual.draw_schedules(jax.random.key(3), jnp.int32(0), len(tokens), setup)
    return collect_outcomes(None, weights, tokens, schedules, None, setup)


def test_a_full_step_after_full_steps_loses_nothing(learner):
    setup, weights, tokens = learner
    found = outcomes(weights, tokens, setup)
    dense = found.action[..., 0] == setup.space.dense
    if not np.any(dense):
        pytest.fail("the draw has no full first step; take another key")
    np.testing.assert_allclose(found.loss[..., 0][dense], 0.0, atol=1e-5)


def test_it_learns_and_repeats_exactly(learner):
    """The deviance falls; and two runs are bit-equal."""
    setup, weights, tokens = learner

    def run(updates):
        state, told = init_state(jax.random.key(0), setup), []
        for _ in range(updates):
            state, metrics = jit_train_step(state, weights, tokens, setup=setup)
            told.append(float(metrics["policy/loss"]))
        return state, told

    state, told = run(12)
    assert np.mean(told[-3:]) < 0.8 * np.mean(told[:3])
    again, _ = run(12)
    assert all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state.params, again.params)), strict=True)
    )
    assert np.all(np.diff(state.params["prices"]["cost"]) <= 1e-6)


def test_the_first_table_is_that_of_the_first_update(learner):
    setup, weights, tokens = learner
    found = counterfactual.flattened(outcomes(weights, tokens, setup))
    params = init_state(jax.random.key(0), setup).params
    after = recalibrated(params, found.observation, jnp.int32(1), setup, False)
    predict = jax.jit(jax.vmap(lambda obs: setup.network.apply(params, obs, method="losses")))
    _, losses = predict(found.observation)
    of_kappa = losses[0].reshape(-1, losses[0].shape[-1])
    alike = jnp.ones((len(of_kappa), len(loss_head.PRICES_M)))
    wanted = loss_head.mean_costs(of_kappa, jnp.array(setup.policy.level_costs[0]), alike)
    np.testing.assert_allclose(after["prices"]["cost"][0], wanted, rtol=1e-5)
    means = np.concatenate([loss.mean((0, 1)) for loss in losses])
    np.testing.assert_allclose(after["prices"]["loss"], means, rtol=1e-5, atol=1e-7)
    later = recalibrated(params, found.observation, jnp.int32(10**6), setup, False)
    moved = later["prices"]["cost"][0] - params["prices"]["cost"][0]
    np.testing.assert_allclose(moved, (wanted - params["prices"]["cost"][0]) / 50, rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def counts(tiny_folder, tiny_session):
    """A learner that counts after one update, and parameters by which tokens differ in what they lose."""
    # So small a rate that these stay: what a policy learns here cannot be bought at any price.
    few = {"counterfactual.count_after": 1, "optim.learning_rate": 1e-12}
    fields = FIELDS | few | {"policy.restate": True}
    setup = tiny.config_for(tiny_folder, **fields).setup(tiny_session.setup.model)
    params = init_state(jax.random.key(0), setup).params
    params["params"]["head"]["kernel"] *= 10
    return setup, params


def test_schedules_are_given_as_long_as_it_learns(learner, counts):
    plain, counting = learner[0], counts[0]
    for key in range(3):
        first, same = (
            counterfactual.draw_schedules(jax.random.key(key), jnp.int32(0), 2, s) for s in (plain, counting)
        )
        np.testing.assert_array_equal(first.action_BxWxKxT, same.action_BxWxKxT)
        assert first.action_BxWxKxT.min() >= 0
        assert not np.any(same.asked_BxWxKxX)


def test_requests_are_over_each_axis_range_half_of_them_alike(learner):
    space = learner[0].space
    asked = np.asarray(counterfactual.draw_requests(jax.random.key(0), (4000,), space))
    low, high = (np.array([axis.budget[end] for axis in space.axes]) for end in (0, 1))
    part = (asked - low) / (high - low)
    assert 0 <= part.min() < 0.01
    assert 0.99 < part.max() <= 1
    np.testing.assert_allclose(part.mean(0), 0.5, atol=0.02)
    alike = np.ptp(part, axis=1) < 1e-5
    assert 0.47 < alike.mean() < 0.53
    assert abs(np.corrcoef(part[~alike].T)[0, 1:]).max() < 0.1


def test_it_counts_on_schedules_that_the_policy_plays_at_prices_that_are_held(learner, counts):
    (_, weights, tokens), (setup, params) = learner, counts
    drawn = counterfactual.draw_schedules(jax.random.key(3), jnp.int32(1), len(tokens), setup)
    assert np.all(drawn.action_BxWxKxT == counterfactual.OWN)
    found = collect_outcomes(params, weights, tokens, drawn, None, setup)
    held = dataclasses.replace(setup.policy, config=dataclasses.replace(setup.policy.config, restate=False))

    @jax.jit
    def alone(asked):
        blocks = prefill_blocks(weights, tokens, setup)
        player = policy_controller(Policy(held), params, 1.0, greedy=True)
        memory = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (*asked.shape[:-1], *leaf.shape)), player.memory
        )
        return run_schedules(weights, blocks, jax.random.key(0), asked, Controller(player.act, memory), setup)

    np.testing.assert_array_equal(found.action, alone(drawn.asked_BxWxKxX).action)


def test_prices_that_were_counted_buy_what_is_asked_for_and_nothing_else_changes(learner, counts):
    (_, weights, tokens), (setup, params) = learner, counts
    state = init_state(jax.random.key(0), setup)._replace(params=params)
    costs = jnp.asarray(setup.space.costs_AxX)

    def misses(state):
        missed = []
        for key in range(100, 116):
            drawn = counterfactual.draw_schedules(jax.random.key(key), jnp.int32(1), len(tokens), setup)
            found = collect_outcomes(state.params, weights, tokens, drawn, None, setup)
            missed.append((costs[found.action].mean(-2) - drawn.asked_BxWxKxX).mean((0, 1, 2)))
        return np.abs(np.mean(missed, 0)).max()

    state, _ = jit_train_step(state, weights, tokens, setup=setup)
    learned = jax.tree.map(np.asarray, (state.params["params"], state.opt_state))
    before = misses(state)
    for _ in range(30):
        state, metrics = jit_train_step(state, weights, tokens, setup=setup)
    after = jax.tree.map(np.asarray, (state.params["params"], state.opt_state))
    assert all(map(np.array_equal, *map(jax.tree.leaves, (learned, after))))
    assert np.isfinite(metrics["policy/loss"])
    assert before > 0.05  # by what was counted on random pasts
    assert misses(state) < 0.03


def test_the_controller_serves_any_budget(learner):
    """One network: what is asked for moves the price, and a higher request never costs less."""
    setup, _, _ = learner
    params = init_state(jax.random.key(0), setup).params
    greedy = policy_controller(setup.network, params, temperature=1.0, greedy=True)
    seen = example_observation(setup.policy)._replace(progress=jnp.float32(1 / setup.episode.horizon))
    act, spent = jax.jit(greedy.act), []
    for share in (0.0, 0.3, 0.6, 1.0):
        low = np.array([axis.cost(axis.levels[0]) for axis in setup.space.axes])
        asked = seen._replace(target=jnp.asarray(low + share * (1 - low), jnp.float32))
        action, _, _ = act(jax.random.key(0), asked, greedy.memory)
        spent.append(setup.space.costs_AxX[int(action)])
    assert np.all(np.diff(spent, axis=0) >= 0)
    np.testing.assert_allclose(spent[-1], 1.0)


@pytest.mark.parametrize("how", ["counterfactual", "grpo"])
def test_the_table_of_costs_does_not_decay(learner, how, tiny_folder, tiny_session):
    """It is counted, not learned: with a weight decay that halves all else it is what prices buy."""
    fields = FIELDS | {"learner": how, "optim.weight_decay": 100.0, "optim.learning_rate": 5e-3}
    setup = tiny.config_for(tiny_folder, **fields).setup(tiny_session.setup.model)
    _, weights, tokens = learner
    state, _ = jit_train_step(init_state(jax.random.key(0), setup), weights, tokens, setup=setup)
    cheapest = [min(costs) for costs in setup.policy.level_costs]
    np.testing.assert_allclose(state.params["prices"]["cost"][:, -1], cheapest, atol=1e-6)
