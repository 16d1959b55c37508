"""The whole update on a tiny model: its numbers, its rewards, its minibatches, and that it learns."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import llama_config

from sol_jax.axes.base import ActionSpace
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.costs import update as flops
from sol_jax.models import llama
from sol_jax.rl import collect as collecting
from sol_jax.rl import learn
from sol_jax.rl import train_step as update
from sol_jax.rl.config import EpisodeConfig, GrpoConfig, MemoryConfig, OptimConfig, PolicyConfig
from sol_jax.rl.learn import Experience
from sol_jax.rl.policy import Observation, PolicySpec
from sol_jax.rl.rollout import (
    EpisodeRules,
    Rollout,
    acceptance_logp,
    dense_divergence,
    label_logp,
    replay,
)
from sol_jax.rl.setup import Setup

MODEL = llama_config()
SPACE = ActionSpace(
    (
        Quest((0.1, 1.0), (0.1, 1.0), 100.0, (0.4,), page_size=4),
        ChannelPruning((0.4, 1.0), (0.4, 1.0), 100.0, (0.7,)),
        OutputQuantization((5.0, 16.0), (0.3125, 1.0), 200.0, (0.8,)),
    )
)
B, W, K, T, S = 2, 2, 8, 4, 13
SETUP = Setup(
    EpisodeRules(MODEL, SPACE, EpisodeConfig(prefix_len=S, horizon=T, episodes_per_prefix=W)),
    PolicySpec(MODEL.hidden_size, SPACE.num_actions, T, config=PolicyConfig(d_model=16)),
    GrpoConfig(num_schedules=K, entropy_coef=0.01),
    OptimConfig(learning_rate=1e-2, minibatch_steps=32, accumulate=1),
    MemoryConfig(head_rows=16),
)
# One update from fixed keys, on the CPU.
GOLDEN = {
    "policy/budget_loss": 0.0,
    "budget_gap/eta": 0.177441,
    "budget_gap/kappa": 0.180469,
    "budget_gap/rho": 0.126563,
    "cost/eta": 0.650879,
    "cost/kappa": 0.416406,
    "cost/rho": 0.695313,
    "penalty": 14.3623,
    "penalty/eta": 8.82569,
    "penalty/kappa": 3.41383,
    "penalty/rho": 2.12281,
    "policy/clip_share": 0.578125,
    "policy/entropy": 1.89452,
    "policy/grad_norm": 1.05338,
    "policy/kl": 0.0,
    "policy/kl_old": 0.163999,
    "policy/loss": 0.0212518,
    "policy/nonzero_adv_share": 1.0,
    "policy/param_norm": 22.7045,
    "policy/policy_loss": 0.0401969,
    "policy/ratio_max": 2.12916,
    "policy/ratio_min": 0.39543,
    "policy/ratio_p05": 0.435861,
    "policy/ratio_p50": 0.839295,
    "policy/ratio_p95": 1.8027,
    "reward": -4.50029,
}


def grpo_of(setup, **fields):
    return dataclasses.replace(setup, grpo=dataclasses.replace(setup.grpo, **fields))


@pytest.fixture(scope="module")
def weights():
    return llama.init_weights(jax.random.key(0), MODEL)


@pytest.fixture(scope="module")
def tokens_BxN():
    return jax.random.randint(jax.random.key(1), (B, SETUP.episode.block_length), 0, MODEL.vocab_size)


def first_state():
    return update.init_state(jax.random.key(2), SETUP)


def test_golden_metrics(weights, tokens_BxN):
    _, metrics = update.jit_train_step(first_state(), weights, tokens_BxN, setup=SETUP)
    found = {name: float(f"{float(value):.6g}") for name, value in metrics.items()}
    told = f"if the change is intended, record what came out: GOLDEN = {found}"
    assert set(found) == set(GOLDEN), told
    for name, value in GOLDEN.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-5), f"{name}; {told}"


def test_an_update_is_a_function_of_its_arguments_and_takes_its_state(weights, tokens_BxN):
    state = first_state()
    one, _ = update.jit_train_step(state, weights, tokens_BxN, setup=SETUP)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))  # donated
    two, _ = update.jit_train_step(first_state(), weights, tokens_BxN, setup=SETUP)
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    jax.tree.map(np.testing.assert_array_equal, one.opt_state, two.opt_state)
    assert int(one.step) == 1


def model_that_reads_nothing():
    """Weights that predict the same after any text and action, and the log-probability of every token.

    That of token 1 is above those of the rest, that of token 2 four times as far.
    """
    cfg = dataclasses.replace(MODEL, tie_embeddings=False)
    weights, one_D = llama.init_weights(jax.random.key(0), cfg), jnp.eye(1, MODEL.hidden_size)[0]
    weights["embed"] = jnp.broadcast_to(one_D, weights["embed"].shape)
    weights["layers"] = jax.tree.map(jnp.zeros_like, weights["layers"])
    weights["lm_head"] = jnp.zeros_like(weights["lm_head"]).at[0, 1:3].set(jnp.array([0.5, 2.0]))
    hidden_1xD, _ = llama.prefill(weights, jnp.zeros(1, jnp.int32), cfg)
    return weights, jax.nn.log_softmax(llama.logits(weights, hidden_1xD[0]))


def starts_of(setup, updates):
    """How many tokens earlier each block of some updates started, [updates, B], read off the rewards.

    All tokens are 0 but for the prefixes, of 1 in the first block and 2 in the second: each token that a
    block starts early is one more of these among its labels.
    """
    assert setup.episode.jitter < 4
    weights, logp_V = model_that_reads_nothing()
    tokens_BxN = jnp.zeros((B, setup.episode.block_length), jnp.int32)
    tokens_BxN = tokens_BxN.at[:, : S + 1].set(jnp.array([[1], [2]]))
    first, starts = first_state(), []

    @jax.jit
    def reward_of(step):
        """Which depends on nothing else that updates change, so that they need not be computed."""
        state = first._replace(step=step)
        return update.train_step(state, weights, tokens_BxN, setup=setup)[1]["reward"]

    for step in range(updates):
        above = (float(reward_of(step)) - float(logp_V[0])) * B * W * T / float(logp_V[1] - logp_V[0])
        assert above == pytest.approx(round(above), abs=0.01)
        starts.append([round(above) % 4, round(above) // 4])
    return np.array(starts)


def inputs_of_the_prefill(setup):
    """How many arrays the loop over the blocks of an update reads, one slice of each at a time."""
    weights = llama.abstract_weights(MODEL)
    tokens_BxN = jax.ShapeDtypeStruct((B, setup.episode.block_length), jnp.int32)
    program = jax.make_jaxpr(lambda *args: update.train_step(*args, setup))(
        first_state(), weights, tokens_BxN
    )
    loop = next(eqn for eqn in program.eqns if eqn.primitive.name == "scan")
    pairs = zip(loop.invars, loop.params["jaxpr"].in_avals, strict=True)
    return sum(len(whole.aval.shape) > len(slice.shape) for whole, slice in pairs)


def test_jitter_starts_each_block_anew_and_only_when_it_is_asked_for():
    """Drawn from 0 to its bound, other in other updates; without it starts are no input of the program."""
    jittered = SETUP.with_rules(episode=dataclasses.replace(SETUP.episode, jitter=3))
    starts = starts_of(jittered, 20)
    assert set(starts.ravel().tolist()) == {0, 1, 2, 3}
    assert np.any(starts[:, 0] != starts[:, 1])
    np.testing.assert_array_equal(starts_of(SETUP, 2), np.zeros((2, B)))
    assert (inputs_of_the_prefill(SETUP), inputs_of_the_prefill(jittered)) == (1, 2)


def test_it_learns_to_meet_budgets(weights, tokens_BxN):
    """Of a model that predicts the same whatever it reads, only the penalty is left to learn from."""
    blind = weights | {"embed": jnp.zeros_like(weights["embed"])}
    state, gaps = first_state(), []
    for _ in range(80):
        state, metrics = update.jit_train_step(state, blind, tokens_BxN, setup=SETUP)
        gaps.append([float(metrics[f"budget_gap/{axis.name}"]) for axis in SPACE.axes])
        assert float(metrics["reward"]) == pytest.approx(-np.log(MODEL.vocab_size), rel=1e-5)
    before, after = np.mean(gaps[:5], 0), np.mean(gaps[-10:], 0)
    # Of 4 steps with two levels each the nearest mean is up to an eighth of the span away from a target.
    assert np.all(after < before)
    assert np.all(after < 0.15), (before, after)


# --- the reward ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(weights, tokens_BxN):
    """Fixed schedules, and per w the reward of `collect`."""
    action_KxT = jax.random.randint(jax.random.key(3), (K, T), 0, SPACE.num_actions)
    action = jnp.broadcast_to(action_KxT, (B, W, K, T))
    budget = jnp.full((B, W, 3), 0.7)

    def run(w):
        setup = grpo_of(SETUP, divergence_weight=w)
        controller = replay(action[0, 0, 0])
        return jax.jit(
            lambda: collecting.collect(weights, controller, tokens_BxN, jax.random.key(4), budget, setup)
        )()

    return {w: run(w) for w in (0.0, 0.5, 1.0)}


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0])
def test_reward_equals_a_naive_computation(weights, tokens_BxN, played, w):
    rollout, reward = played[w]
    dense = jax.vmap(lambda tokens_N: llama.prefill(weights, tokens_N[:-1], MODEL)[0])(tokens_BxN)
    for b in range(B):
        for e in range(W):
            for t in range(T):
                at = S + e * T + t
                hidden_D = rollout.hidden[b, e, 0, t]
                logp = label_logp(weights, hidden_D, tokens_BxN[b, at + 1])
                kl = dense_divergence(weights, dense[b, at], hidden_D)
                expected = (1 - w) * logp - w * kl
                np.testing.assert_allclose(reward[b, e, 0, t], expected, atol=2e-5, rtol=1e-5)


def test_acceptance_is_the_overlap_of_the_two_distributions(weights, tokens_BxN, played):
    rollout, _ = played[0.0]
    setup = grpo_of(SETUP, reward="acceptance")
    dense = llama.prefill(weights, tokens_BxN[0, :-1], MODEL)[0]
    budget = jnp.full((B, W, 3), 0.7)

    def collected(action_T):
        controller = replay(action_T)
        return collecting.collect(weights, controller, tokens_BxN, jax.random.key(4), budget, setup)

    _, reward = jax.jit(collected)(rollout.action[0, 0, 0])
    for t in range(T):
        both = [llama.logits(weights, h) for h in (dense[S + t], rollout.hidden[0, 0, 0, t])]
        p, q = (np.exp(np.float64(x)) / np.exp(np.float64(x)).sum() for x in both)
        np.testing.assert_allclose(reward[0, 0, 0, t], np.log(np.minimum(p, q).sum()), atol=2e-5)
    same = acceptance_logp(weights, dense[S], dense[S])
    np.testing.assert_allclose(same, 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("reward", "w", "prefilled", "measures"),
    [
        ("likelihood", 0.0, S + (W - 1) * T, ["label"]),
        ("likelihood", 0.5, S + W * T, ["label", dense_divergence]),
        ("likelihood", 1.0, S + W * T, [dense_divergence]),
        ("acceptance", 0.0, S + W * T, [acceptance_logp]),
    ],
)
def test_nothing_is_computed_that_the_reward_does_not_need(
    reward, w, prefilled, measures, monkeypatch, tokens_BxN
):
    """No dense reference for likelihoods alone, and no label's log-probability without any."""
    lengths, called = [], []
    prefill = llama.prefill

    def counting(weights, tokens_N, cfg):
        lengths.append(len(tokens_N))
        return prefill(weights, tokens_N, cfg)

    score_labels, beside_dense = collecting.score_labels, collecting.beside_dense
    monkeypatch.setattr(llama, "prefill", counting)
    monkeypatch.setattr(
        collecting, "score_labels", lambda *args: (called.append("label"), score_labels(*args))[1]
    )
    monkeypatch.setattr(
        collecting, "beside_dense", lambda of, *args: (called.append(of), beside_dense(of, *args))[1]
    )
    setup = grpo_of(SETUP, reward=reward, divergence_weight=w)
    budget = jnp.full((B, W, 3), 0.7)
    controller = replay(jnp.zeros(T, jnp.int32))
    jax.eval_shape(
        lambda weights: collecting.collect(weights, controller, tokens_BxN, jax.random.key(4), budget, setup),
        llama.abstract_weights(MODEL),
    )
    assert set(lengths) == {prefilled}
    assert called == measures


# --- minibatches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_schedules", "steps", "shape"), [(10, 12, (4, 3)), (8, 8, (4, 2)), (3, 512, (1, 3)), (5, 1, (5, 1))]
)
def test_minibatches_take_every_schedule_once(num_schedules, steps, shape):
    cfg = OptimConfig(minibatch_steps=steps)
    index_JxR, weight_JxR = learn.minibatches(jax.random.key(0), num_schedules, cfg, T)
    assert index_JxR.shape == weight_JxR.shape == shape
    assert sorted(index_JxR[weight_JxR == 1].tolist()) == list(range(num_schedules))
    assert set(np.unique(weight_JxR)) <= {0.0, 1.0}


def experience_of(num_schedules, key=5):
    """Made up, but of the right shapes."""
    keys = jax.random.split(jax.random.key(key), 6)
    N, D, A = num_schedules, MODEL.hidden_size, SPACE.num_actions
    numbers = jax.random.uniform(keys[2], (N, T, 8))
    observation = Observation(
        hidden=jax.random.normal(keys[0], (N, T, D)),
        embed=jax.random.normal(keys[1], (N, T, D)),
        progress=numbers[..., 0],
        controllable=numbers[..., 1],
        target=numbers[..., 2:5],
        gap=numbers[..., 5:],
        prev_action=jax.random.randint(keys[3], (N, T), 0, A + 1),
        num_keys=jnp.tile(jnp.arange(T), (N, 1)),
        logit=30 * numbers[..., 0],
    )
    action_NxT = jax.random.randint(keys[4], (N, T), 0, A)
    return Experience(observation, action_NxT, jnp.full((N, T), -2.0), jax.random.normal(keys[5], (N, T)))


def fitted(setup, experience, index_JxR, weight_JxR, state=None):
    state = state or update.init_state(jax.random.key(2), setup)
    index, weight = jnp.array(index_JxR), jnp.array(weight_JxR, jnp.float32)
    return jax.jit(learn.fit, static_argnames="setup")(state, experience, index, weight, setup=setup)


def test_padding_changes_nothing():
    experience = experience_of(4)
    short, _ = fitted(SETUP, experience, [[2, 0, 1]], [[1, 1, 1]])
    padded, _ = fitted(SETUP, experience, [[2, 0, 1, 3, 3]], [[1, 1, 1, 0, 0]])
    # AdamW's mean gradient, and not its step, which divides by the gradient's size: where that is nothing but
    # rounding, it is a whole step all the same.
    ours, theirs = (optax.tree_utils.tree_get(state.opt_state, "mu") for state in (short, padded))
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(ours))
    assert largest > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), ours, theirs)


def test_gradients_accumulate_across_updates():
    """Two updates of 4 minibatches with accumulate=8 are one optimizer step, on the mean of the gradients."""
    setup = dataclasses.replace(SETUP, optim=OptimConfig(learning_rate=1e-2, accumulate=8))
    joint = dataclasses.replace(SETUP, optim=OptimConfig(learning_rate=1e-2, accumulate=1))
    experience, start = experience_of(8), update.init_state(jax.random.key(2), setup).params
    halves = np.arange(8).reshape(2, 4, 1)
    ones = np.ones((4, 1))
    state, _ = fitted(setup, experience, halves[0], ones)
    jax.tree.map(np.testing.assert_array_equal, state.params, start)
    state, _ = fitted(setup, experience, halves[1], ones, state)
    once, _ = fitted(joint, experience, [np.arange(8)], np.ones((1, 8)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.params, once.params)
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), state.params, start)
    assert max(jax.tree.leaves(moved)) > 1e-3


# --- what is static --------------------------------------------------------------------------------------


def test_setups_are_hashable_values():
    again = dataclasses.replace(SETUP, memory=MemoryConfig(head_rows=16))
    assert again == SETUP
    assert hash(again) == hash(SETUP)
    assert dataclasses.replace(SETUP, memory=MemoryConfig(head_rows=17)) != SETUP


def test_flops_by_hand():
    """D 16, F 32, 2 layers, 4 heads of 4 (2 for keys), vocabulary 64; 32 episodes of 4 steps."""
    layer = 16 * 16 + 16 * 8 + 16 * 8 + 16 * 16 + 3 * 16 * 32  # q, k, v, o, MLP
    M = 13 + 4
    prefill = 2 * (M * 2 * 2 * layer + 2 * (4 * 16) * (M * (M + 1) // 2))
    decoded = 2 * 2 * 8 * 4
    keys = (14 + 15 + 16 + 17 + 18 + 19 + 20 + 21) / 8
    policy = (16 + 16 + 64 + 32) * 16 + 12 * 16 * 16 + 16 * 8 + 32 * (3 + 8) + 8 * 64
    expected = {
        "prefill": prefill,
        "rollout": decoded * (2 * 2 * layer + 2 * (4 * 16) * keys),
        "head": decoded * 2 * 64 * 16,
        "policy": decoded * 2 * policy * 4,
    }
    assert flops.update_flops(SETUP, B) == expected
    both = flops.update_flops(grpo_of(SETUP, divergence_weight=0.5), B)
    assert both["head"] == 3 * expected["head"]
    assert both["prefill"] > expected["prefill"]


def test_without_the_quality_weight_only_budgets_are_rewarded():
    """Two schedules of one step each: one is likelier, the other meets its budget."""
    grpo = dataclasses.replace(SETUP.grpo, whiten=False)
    X = len(SETUP.space.axes)
    cost = jnp.stack([jnp.full((1, X), 1.0), jnp.full((1, X), 0.5)])[None, None]
    played = Rollout(None, None, None, cost, jnp.ones((1, 1, 2, 1), bool), None)
    reward, budget = jnp.array([-1.0, -3.0]).reshape(1, 1, 2, 1), jnp.full((1, 1, X), 0.5)

    def advantage(weight):
        cfg = dataclasses.replace(grpo, quality_weight=weight)
        return learn.advantages(reward, played, budget, dataclasses.replace(SETUP, grpo=cfg))[0].ravel()

    spent = sum(axis.penalty_weight for axis in SETUP.space.axes) * (0.5 - grpo.dead_zone) ** 2 / 2
    np.testing.assert_allclose(advantage(0.0), [-spent, spent], rtol=1e-5)
    np.testing.assert_allclose(advantage(1.0), [1 - spent, spent - 1], rtol=1e-5)


def test_prices_are_the_slope_of_the_penalty_spread_over_the_steps_that_count():
    """Budget 0.5: schedules that cost 0.8 and 0.5 in the two steps that count; one more step does not."""
    X, (dead, T_) = len(SETUP.space.axes), (SETUP.grpo.dead_zone, 3)
    cost = jnp.stack([jnp.full((T_, X), 0.8), jnp.full((T_, X), 0.5)])[None, None]
    counted = jnp.broadcast_to(jnp.array([False, True, True]), (1, 1, 2, T_))
    played = Rollout(None, None, None, cost, counted, None)
    reward, budget = jnp.array([[-1.0] * T_, [-3.0] * T_])[None, None], jnp.full((1, 1, X), 0.5)

    def priced(**changes):
        grpo = dataclasses.replace(SETUP.grpo, gamma=0.0, **changes)
        setup = dataclasses.replace(SETUP, grpo=grpo)
        return (
            learn.advantages(reward, played, budget, setup)[0],
            learn.prices(reward, played, budget, setup),
        )

    assert priced(whiten=False)[1] is None
    adv, price = priced(penalty_gradient="expected", whiten=False)
    np.testing.assert_allclose(adv[0, 0, :, 0], [1, -1], rtol=1e-6)  # of the likelihood alone
    weight_X = np.array([axis.penalty_weight for axis in SETUP.space.axes])
    np.testing.assert_allclose(price[0, 0, 0, 1], 2 * weight_X * (0.3 - dead) / 2, rtol=1e-5)
    np.testing.assert_array_equal(price[0, 0, 0, 0], np.zeros(X))
    np.testing.assert_array_equal(price[0, 0, 1], np.zeros((T_, X)))
    # Where every step has the advantage of the whole episode, it has the price of the whole episode too.
    outcome = priced(penalty_gradient="expected", whiten=False, level="outcome")
    np.testing.assert_allclose(outcome[0][0, 0, :, 0], [T_, -T_], rtol=1e-6)
    np.testing.assert_allclose(outcome[1], T_ * price, rtol=1e-6)
    # Beside likelihoods this close a unit of cost is worth the most it may be; whitened, it is worth half as
    # much beside those that are twice as far apart.
    for most in (2.0, 5.0):
        assert float(priced(penalty_gradient="expected", max_price=most)[1].max()) == most
    reward = 100 * reward
    whitened = priced(penalty_gradient="expected")[1]
    np.testing.assert_allclose(whitened[0, 0, 0, 1], price[0, 0, 0, 1] / 100, rtol=1e-5)
    reward = 2 * reward
    np.testing.assert_allclose(priced(penalty_gradient="expected")[1], whitened / 2, rtol=1e-5)


def test_expected_costs_meet_budgets_without_any_reward(weights, tokens_BxN):
    """With nothing but prices to learn from, the policy's costs come closer to what is asked."""
    setup = grpo_of(SETUP, penalty_gradient="expected", quality_weight=0.0, entropy_coef=0.0)
    setup = dataclasses.replace(setup, optim=OptimConfig(learning_rate=3e-3, accumulate=1))
    state, gaps = update.init_state(jax.random.key(0), setup), []
    step = jax.jit(update.train_step, static_argnames="setup")
    for _ in range(30):
        state, metrics = step(state, weights, tokens_BxN, setup=setup)
        gaps.append([metrics[f"budget_gap/{axis.name}"] for axis in SPACE.axes])
    before, after = np.mean(gaps[:5], 0), np.mean(gaps[-5:], 0)
    assert np.all(after < before), (before, after)


def test_groups_with_less_noise(weights, tokens_BxN):
    """Stratified schedules of a group, credited by axis: what an update learns from, and that it does."""
    config = PolicyConfig(d_model=16, factored_head=True)
    levels = tuple(tuple(axis.cost(level) for level in axis.levels) for axis in SPACE.axes)
    setup = dataclasses.replace(
        grpo_of(SETUP, sampling="stratified", credit="axis"),
        policy=dataclasses.replace(SETUP.policy, config=config, level_costs=levels),
    )
    state = update.init_state(jax.random.key(2), setup)
    drawn = jax.jit(functools.partial(update.draw, num_blocks=B, setup=setup))(state.key, state.step)
    play = jax.jit(functools.partial(update.play, setup=setup))
    rollout, _ = play(state.params, weights, tokens_BxN, drawn)
    # Before the first step all schedules of a group see the same, so that they are spread evenly.
    first = jax.tree.map(lambda leaf: leaf[:, :, 0, :1], rollout.observation)
    apply = jax.jit(functools.partial(setup.network.apply, state.params))
    for b, w in np.ndindex(B, W):
        logits_1xA = apply(jax.tree.map(operator.itemgetter((b, w)), first))
        prob = jax.nn.softmax(logits_1xA[0] / setup.grpo.temperature).reshape(2, 2, 2)
        taken = np.unravel_index(np.asarray(rollout.action[b, w, :, 0]), (2, 2, 2))
        for x in range(3):
            high = float(prob.sum(tuple({0, 1, 2} - {x}))[1])
            assert abs(taken[x].sum() - K * high) < 1 + 1e-3
    experience = Experience(rollout.observation, rollout.action, rollout.logp, rollout.logp)
    split = jax.jit(functools.partial(learn.by_axis, setup=setup))(state.params, experience, rollout.cost)
    np.testing.assert_allclose(split.logp.sum(-1), rollout.logp, rtol=1e-3, atol=1e-4)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = update.jit_train_step(state, weights, tokens_BxN, setup=setup)
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True)
    )
