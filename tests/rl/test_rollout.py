"""Rollouts: episodes that share a prefill equal separate ones, schedules in a batch equal single ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config

from sol_jax.axes.base import ActionSpace
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.models import llama
from sol_jax.rl import rollout
from sol_jax.rl.config import EpisodeConfig, PolicyConfig
from sol_jax.rl.policy import Policy, PolicySpec, example_observation, initial_carry
from sol_jax.rl.rollout import Controller, EpisodeRules, group_rollout, prefill_block, replay

MODEL = llama_config()
SPACE = ActionSpace(
    (
        Quest((0.2, 0.5, 1.0), (0.2, 1.0), 100.0, page_size=4),
        ChannelPruning((0.5, 1.0), (0.5, 1.0), 100.0),
        OutputQuantization((4.0, 16.0), (0.25, 1.0), 200.0),
    )
)
S, T, W, K = 13, 5, 3, 4
SHAPE = EpisodeConfig(prefix_len=S, horizon=T, episodes_per_prefix=W)
RULES = EpisodeRules(MODEL, SPACE, SHAPE)
BUDGET_X = jnp.array([0.5, 0.7, 0.6])


@pytest.fixture(scope="module")
def weights():
    return llama.init_weights(jax.random.key(0), MODEL)


@pytest.fixture(scope="module")
def tokens_N():
    return jax.random.randint(jax.random.key(1), (SHAPE.block_length,), 0, MODEL.vocab_size)


@pytest.fixture(scope="module")
def actions_WxKxT():
    return jax.random.randint(jax.random.key(2), (W, K, T), 0, SPACE.num_actions)


def played(weights, block, actions_WxKxT, rules=RULES):
    """K schedules of every episode of a block."""
    keys = jax.random.split(jax.random.key(3), actions_WxKxT.shape[1])
    budgets = jnp.broadcast_to(BUDGET_X, (len(keys), 3))

    def each(episode, actions_KxT):
        return group_rollout(weights, rules, block.cache, episode, keys, budgets, replay(actions_KxT))

    return jax.vmap(each)(block.episodes, actions_WxKxT)


@jax.jit
def play_block(weights, tokens_N, actions_WxKxT):
    return played(weights, prefill_block(weights, tokens_N, RULES), actions_WxKxT)


@pytest.fixture(scope="module")
def shared(weights, tokens_N, actions_WxKxT):
    """All W episodes of the block, from one prefill."""
    return play_block(weights, tokens_N, actions_WxKxT)


def assert_close(ours, theirs, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5), ours, theirs)


@pytest.mark.parametrize("w", range(W))
def test_episodes_of_one_prefill_equal_separate_ones(weights, tokens_N, actions_WxKxT, shared, w):
    """Each sees its own past only, densely: the compressed steps of the episode before leave no trace."""
    alone = dataclasses.replace(SHAPE, prefix_len=S + w * T, episodes_per_prefix=1)
    rules = dataclasses.replace(RULES, episode=alone)

    @jax.jit
    def separate():
        block = prefill_block(weights, tokens_N[: alone.block_length], rules)
        return played(weights, block, actions_WxKxT[w : w + 1], rules)

    assert_close(jax.tree.map(lambda x: x[w], shared), jax.tree.map(lambda x: x[0], separate()))


@pytest.mark.parametrize("early", [0, 3])
def test_episodes_that_start_early_are_those_of_a_shorter_prefix(weights, tokens_N, actions_WxKxT, early):
    """Also where the start is known only when the program runs."""
    shorter = dataclasses.replace(RULES, episode=dataclasses.replace(SHAPE, prefix_len=S - early))

    def seen_and_played(block, rules):
        return played(weights, block, actions_WxKxT, rules), block.episodes.label, block.dense_hidden

    @jax.jit
    def run(early):
        return seen_and_played(prefill_block(weights, tokens_N, RULES, with_dense=True, early=early), RULES)

    @jax.jit
    def alone():
        return seen_and_played(prefill_block(weights, tokens_N, shorter, with_dense=True), shorter)

    assert_close(run(early), alone())
    seen_W = run(early)[0].observation.num_keys[:, 0, 0]
    np.testing.assert_array_equal(seen_W, S - early + T * np.arange(W) + 1)


def test_what_comes_later_in_the_block_does_not_matter(weights, tokens_N, actions_WxKxT, shared):
    """Tokens after the first episode change, and nothing of it."""
    changed_N = tokens_N.at[S + T + 1 :].set((tokens_N[S + T + 1 :] + 1) % MODEL.vocab_size)
    again = play_block(weights, changed_N, actions_WxKxT)
    assert_close(jax.tree.map(lambda x: x[0], again), jax.tree.map(lambda x: x[0], shared))
    assert not np.allclose(again.hidden[2], shared.hidden[2], atol=1e-3)


def test_schedules_in_a_batch_equal_single_ones(weights, tokens_N):
    """With a policy that samples: same keys, same actions, same everything."""
    spec = PolicySpec(MODEL.hidden_size, SPACE.num_actions, T, config=PolicyConfig(d_model=16))
    policy = Policy(spec)
    example = example_observation(spec), initial_carry(spec)
    params = jax.jit(functools.partial(policy.init, method="step"))(jax.random.key(4), *example)
    rules = dataclasses.replace(RULES, episode=dataclasses.replace(SHAPE, episodes_per_prefix=1))
    block = prefill_block(weights, tokens_N, rules)
    cache, episode = block.cache, jax.tree.map(lambda x: x[0], block.episodes)
    controller = rollout.policy_controller(policy, params, temperature=1.3)
    key_K = jax.random.split(jax.random.key(5), K)
    budget_KxX = jax.random.uniform(jax.random.key(6), (K, 3), minval=0.5)
    memory_K = jax.tree.map(lambda x: jnp.broadcast_to(x, (K, *x.shape)), controller.memory)
    memories = Controller(controller.act, memory_K)
    group = jax.jit(lambda: group_rollout(weights, rules, cache, episode, key_K, budget_KxX, memories))()
    single = jax.jit(lambda *drawn: rollout.rollout(weights, rules, cache, episode, *drawn, controller))
    for k in range(K):
        assert_close(jax.tree.map(lambda x, k=k: x[k], group), single(key_K[k], budget_KxX[k]))
    assert len(np.unique(np.asarray(group.action))) > 1


def test_costs_and_flags_are_those_of_the_actions(shared, actions_WxKxT):
    np.testing.assert_array_equal(shared.action, actions_WxKxT)
    np.testing.assert_array_equal(shared.cost, SPACE.costs_AxX[np.asarray(actions_WxKxT)])
    assert np.all(shared.controllable)


def test_steps_with_few_keys_are_dense_and_do_not_count(weights, tokens_N):
    # kv_len 5, 6, 7 are forced, 8 and 9 free
    shape = EpisodeConfig(prefix_len=4, horizon=T, sinks=4, window=2)
    rules = dataclasses.replace(RULES, episode=shape)
    block = prefill_block(weights, tokens_N[: shape.block_length], rules)
    cheapest = jnp.zeros((1, 1, T), jnp.int32)
    seen = played(weights, block, cheapest, rules)
    np.testing.assert_array_equal(seen.controllable[0, 0], [False, False, False, True, True])
    np.testing.assert_array_equal(seen.cost[0, 0, :3], np.ones((3, 3)))
    np.testing.assert_array_equal(seen.cost[0, 0, 3:], np.tile(SPACE.costs_AxX[0], (2, 1)))
