"""A whole recorded training step, from tokens to the updated policy, through the stages of `train_step`.

Fed the authors' tokens, budgets, sampled actions and order of minibatches, everything else must come out as
theirs.  `test_reward_vectors` checks the parts on the recorded inputs of each; here each stage gets what ours
before it gave, the language model's own hidden states included.
"""

import functools
from typing import Any, NamedTuple

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sol_jax.axes.base import ActionSpace, Axis
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest, Recency, Relevancy
from sol_jax.axes.rho import ChannelPruning
from sol_jax.models.llama import LlamaConfig, Weights
from sol_jax.rl import grpo, rewards
from sol_jax.rl.collect import beside_dense, prefill_blocks, run_schedules, score_labels
from sol_jax.rl.config import EpisodeConfig, GrpoConfig, OptimConfig
from sol_jax.rl.learn import Experience, TrainState, advantages, fit, optimizer
from sol_jax.rl.policy import Observation, initial_carry
from sol_jax.rl.rollout import Controller, EpisodeRules, Rollout, dense_divergence
from sol_jax.rl.setup import Setup

NUM_RUNS = 12  # the first is not disturbed
# Of the language model's gains in the other runs.  The authors' rounding and ours are as far apart as runs
# that differ by half of 1e-7; at 3e-7 one run or another flips every choice that theirs may have flipped.
DISTURBANCE = 3e-7
# Values that depend on a schedule's later steps, and on other schedules.
FROM_LATER_STEPS = ("x_for_adv", "r_total")
FROM_OTHER_SCHEDULES = ("adv", "adv_flat")
AXES = ("tok", "pru", "qratio")


@pytest.fixture(scope="module", params=("quest_sum_process", "recency_kl_outcome", "quest_short_ctx"))
def vectors(request):
    return golden.load(f"f3_train_step_{request.param}")


# --- the authors' configuration as ours ---------------------------------------------------------


def _space(vectors: golden.Vectors) -> ActionSpace:
    """Their axes, and as a check their order of the joint actions."""
    cfg = golden.config_of(vectors)
    values_XxA = [vectors[name] for name in ("act_keep", "act_prune", "act_bits")]
    levels = [tuple(np.unique(value_A).tolist()) for value_A in values_XxA]
    attended = {"sinks": cfg["Ts"], "window": cfg["Tw"]}
    kappa: type[Axis] = {"quest": Quest, "recency": Recency, "relevancy": Relevancy}[cfg["sparsity_criteria"]]
    if kappa is Quest:
        attended["page_size"] = cfg["quest_page_size"]
    range_X = [(cfg[f"budget_{name}_min"], cfg[f"budget_{name}_max"]) for name in ("tok", "prune", "q_ratio")]
    space = ActionSpace(
        (
            kappa(levels[0], range_X[0], cfg["alpha_tok"], **attended),
            ChannelPruning(levels[1], range_X[1], cfg["alpha_prune"]),
            OutputQuantization(levels[2], range_X[2], cfg["alpha_quant"]),
        )
    )
    np.testing.assert_array_equal(space.values_AxX, np.stack(values_XxA, -1, dtype=np.float32))
    return space


def _setup(vectors: golden.Vectors, model: LlamaConfig) -> Setup:
    cfg = golden.config_of(vectors)
    shape = EpisodeConfig(cfg["context_len"], cfg["rollout_len"], sinks=cfg["Ts"], window=cfg["Tw"])
    return Setup(
        EpisodeRules(model, _space(vectors), shape),
        golden.policy_spec(vectors, "pol0/", cfg["policy_n_heads"]),
        GrpoConfig(
            num_schedules=cfg["grpo_rollouts_per_input"],
            gamma=cfg["reward_gamma"],
            returns=cfg["reward_agg"] or "none",
            level=cfg["grpo_level"],
            norm=cfg["grpo_norm"],
            whiten=cfg["adv_whiten_global"],
            temperature=cfg["pi_temperature"],
            clip=cfg["ppo_clip"],
            entropy_coef=cfg["entropy_coef"],
            divergence_weight=cfg["task_w_kl"],
            reference_kl_coef=cfg["kl_pi_ref_coef"],
        ),
        OptimConfig(
            learning_rate=cfg["lr"],
            weight_decay=0.01,
            clip_norm=cfg["max_grad_norm"],
            minibatch_steps=cfg["ppo_minibatch_size"],
            accumulate=cfg["grad_accum_steps"],
        ),
    )


# --- one step -----------------------------------------------------------------------------------


def _by_schedule(array_TxN: Any, num_sequences: int) -> jax.Array:
    """[T, B * K, ...] -> [B, W = 1, K, T, ...]; the K schedules of a sequence are neighbours."""
    array_NxT = jnp.moveaxis(jnp.asarray(array_TxN), 0, 1)
    return array_NxT.reshape(num_sequences, 1, -1, *array_NxT.shape[1:])


def _by_step(array_BxWxKxT: Any) -> jax.Array:
    """The way back: [B, W, K, T, ...] -> [T, B * K, ...]."""
    return jnp.moveaxis(array_BxWxKxT.reshape(-1, *array_BxWxKxT.shape[3:]), 1, 0)


def _forced_policy(setup: Setup, params: Any, action_BxWxKxT: jax.Array) -> Controller:
    """The policy sees and judges every step, but the recorded actions are played."""

    def act(key: jax.Array, seen: Observation, memory: Any) -> tuple[jax.Array, jax.Array, Any]:
        carry, coming_T = memory
        logits_A, carry = setup.network.apply(params, seen, carry, method="step")
        logp = grpo.action_logp(logits_A / setup.grpo.temperature, coming_T[0])
        return coming_T[0], logp, (carry, jnp.roll(coming_T, -1))

    start, shape = initial_carry(setup.policy), action_BxWxKxT.shape[:-1]
    carries = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape, *leaf.shape)), start)
    return Controller(act, (carries, action_BxWxKxT))


class Collected(NamedTuple):
    """A batch of rollouts and what is learned from it: [B, W, K, ...]."""

    rollout: Rollout
    reward: jax.Array
    dense_logp: jax.Array  # [B, W, 1, T]
    adv: jax.Array
    penalty: jax.Array
    mean_cost: jax.Array


@functools.partial(jax.jit, static_argnames="setup")
def _collect(
    weights: Weights, params: Any, ids: jax.Array, budget_BxWxX: jax.Array, action: jax.Array, setup: Setup
) -> Collected:
    """`collect` and `advantages`, but for the controller: each schedule has its own actions."""
    rows = setup.memory.head_rows
    blocks = prefill_blocks(weights, ids, setup, with_dense=True)
    controller = _forced_policy(setup, params, action)
    budget = jnp.broadcast_to(budget_BxWxX[:, :, None], (*action.shape[:3], budget_BxWxX.shape[-1]))
    rollout = run_schedules(weights, blocks, jax.random.key(0), budget, controller, setup)
    logp = score_labels(weights, rollout.hidden, blocks.episodes.label, rows)
    kl = beside_dense(dense_divergence, weights, rollout.hidden, blocks.dense_hidden, rows)
    reward = rewards.task_reward(logp, kl, setup.grpo.divergence_weight)
    dense_logp = score_labels(weights, blocks.dense_hidden[:, :, None], blocks.episodes.label, rows)
    return Collected(rollout, reward, dense_logp, *advantages(reward, rollout, budget_BxWxX, setup))


@functools.partial(jax.jit, static_argnames="setup")
def _recorded(found: Collected, setup: Setup) -> dict[str, jax.Array]:
    """What the authors recorded of a batch of rollouts, under their names."""
    rollout, cfg = found.rollout, setup.grpo
    reward_NxT = found.reward.reshape(-1, setup.episode.horizon)
    returns = functools.partial(rewards.returns, gamma=cfg.gamma, how=cfg.returns, level=cfg.level)
    return_BxWxKxT = jax.vmap(returns)(reward_NxT).reshape(found.reward.shape)
    # Theirs are not weighted yet.
    weight_X = np.array([axis.penalty_weight for axis in setup.space.axes])
    penalty_XxN = (found.penalty.reshape(-1, len(weight_X)) / weight_X).T
    cost_XxTxN = jnp.moveaxis(_by_step(rollout.cost), -1, 0)
    return {
        "h_seq": _by_step(rollout.observation.hidden),
        "e_seq": _by_step(rollout.observation.embed),
        "scalars_seq": _by_step(golden.scalars_of(rollout.observation)),
        "prev_actions_seq": _by_step(rollout.observation.prev_action),
        "actions_seq": _by_step(rollout.action),
        "logp_old_seq": _by_step(rollout.logp),
        "eff_all": _by_step(rollout.controllable).astype(jnp.float32),
        "keep_all": cost_XxTxN[0],
        "prune_all": cost_XxTxN[1] * max(setup.space.axes[1].levels),
        "qratio_all": cost_XxTxN[2],
        "r_task_all": _by_step(found.reward),
        "x_for_adv": _by_step(return_BxWxKxT),
        **{f"cost_{name}_seq": penalty_N for name, penalty_N in zip(AXES, penalty_XxN, strict=True)},
        "r_total": _by_step(return_BxWxKxT - found.penalty.sum(-1)[..., None]),
        "adv": _by_step(found.adv),
        "dense_label_logprob": _by_step(found.dense_logp),
    }


@functools.partial(jax.jit, static_argnames="setup")
def _recorded_of_minibatch(
    params: Any, experience: Experience, index_R: np.ndarray, setup: Setup
) -> dict[str, jax.Array]:
    """What the loss is made of; steps are flattened as the authors do, time outermost."""
    batch = jax.tree.map(lambda leaf: leaf[index_R], experience)
    apply = jax.vmap(setup.network.apply, (None, 0))
    logits_RxTxA = apply(params, batch.observation) / setup.grpo.temperature
    logp_RxT = jax.vmap(jax.vmap(grpo.action_logp))(logits_RxTxA, batch.action)
    values_RxT = {
        "logp_new": logp_RxT,
        "logp_old": batch.logp,
        "ratio": jnp.exp(logp_RxT - batch.logp),
        "adv_flat": batch.advantage,
    }
    flat = {name: value_RxT.T.ravel() for name, value_RxT in values_RxT.items()}
    return {"logits_seq": logits_RxTxA.swapaxes(0, 1), **flat}


def _filled_up(index_R: np.ndarray, setup: Setup) -> tuple[jax.Array, jax.Array]:
    """One minibatch as `fit` takes it: a short one is filled up with a schedule of weight 0."""
    size = max(1, setup.optim.minibatch_steps // setup.episode.horizon)
    padding = (0, size - len(index_R))
    return jnp.pad(index_R, padding)[None], jnp.pad(jnp.ones(len(index_R)), padding)[None]


_fit = functools.partial(jax.jit, static_argnames="setup")(fit)


class Step(NamedTuple):
    """What there is to compare."""

    batch: golden.Vectors
    minibatches: list[golden.Vectors]
    params: Any


def _train_step(vectors: golden.Vectors, weights: Weights, setup: Setup) -> Step:
    params = jax.tree.map(jnp.asarray, golden.policy_params(vectors, "pol0/"))
    budget_BxX = np.stack([vectors[f"C_{name}_target_B"] for name in AXES], -1)
    action = _by_schedule(vectors["actions_seq"].astype(np.int32), len(budget_BxX))
    ids = jnp.asarray(vectors["ids"], jnp.int32)
    found = _collect(weights, params, ids, budget_BxX[:, None], action, setup)

    rollout = found.rollout
    experience = Experience(rollout.observation, rollout.action, rollout.logp, found.adv)
    experience = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), experience)
    state = TrainState(jnp.int32(0), jax.random.key(0), params, optimizer(setup.optim).init(params), None)
    minibatches = []
    for i in range(int(vectors["n_minibatches"])):
        index_R = vectors[f"mb{i}/mb_idx"]
        recorded = _recorded_of_minibatch(state.params, experience, index_R, setup)
        state, metrics = _fit(state, experience, *_filled_up(index_R, setup), setup)
        recorded |= {name: metrics[name][0] for name in ("policy_loss", "entropy", "loss")}
        if setup.optim.accumulate == 1:  # theirs is of the gathered gradient
            recorded["grad_norm_preclip"] = metrics["grad_norm"][0]
        minibatches.append(recorded)
    return jax.tree.map(np.asarray, Step(_recorded(found, setup), minibatches, state.params))


# --- the comparison -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(vectors, tmp_path_factory) -> list[Step]:
    """The step as it is, and with the language model disturbed by about its rounding errors."""
    cfg, weights = golden.language_model(vectors, "lm/", tmp_path_factory.mktemp("tiny"))
    gains_N = golden.disturbed(weights, NUM_RUNS, DISTURBANCE)
    runs = (jax.tree.map(lambda gain_N, n=n: gain_N[n], gains_N) for n in range(NUM_RUNS))
    return [_train_step(vectors, golden.with_gains(weights, run), _setup(vectors, cfg)) for run in runs]


def _reach(runs: list[np.ndarray], by_step: bool = True, by_schedule: bool = True) -> np.ndarray:
    """How far rounding may take values [T, N, ...] of the first run: three times as far as in the others.

    A choice of the language model that rounding flips now and then moves its schedule from that step on.
    """
    spread = np.abs(np.stack(runs[1:]) - runs[0]).max(0)
    if not by_schedule or spread.ndim < 2:
        return 3 * spread.max()
    spread = spread.max(tuple(range(2, spread.ndim)), keepdims=True)
    return 3 * (np.maximum.accumulate(spread, 0) if by_step else spread.max(0))


def _assert_close(found: np.ndarray, expected: np.ndarray, reach: np.ndarray, what: str) -> None:
    """Within 1e-5, and `reach` beyond it."""
    assert found.shape == expected.shape, f"{what}: {found.shape} is not {expected.shape}"
    excess = np.abs(found - expected) - (1e-5 + 1e-5 * np.abs(expected) + reach)
    where = np.unravel_index(excess.argmax(), excess.shape)
    assert excess[where] <= 0, f"{what}{where}: {found[where]}, the authors' is {expected[where]}"


def test_rollouts_rewards_and_advantages(vectors, steps):
    for name in steps[0].batch:
        runs = [step.batch[name] for step in steps]
        reach = _reach(runs, name not in FROM_LATER_STEPS, name not in FROM_OTHER_SCHEDULES)
        _assert_close(runs[0], vectors[name], reach, name)
    for name in ("actions_seq", "prev_actions_seq", "e_seq", "eff_all"):
        np.testing.assert_array_equal(steps[0].batch[name], vectors[name], err_msg=name)


def test_minibatches(vectors, steps):
    num_steps = len(vectors["actions_seq"])
    for i, recorded in enumerate(steps[0].minibatches):
        for name, value in recorded.items():
            # The authors flatten steps and schedules.
            shape = (num_steps, -1) if value.ndim == 1 else value.shape
            runs = [step.minibatches[i][name].reshape(shape) for step in steps]
            reach = _reach(runs, by_step=False, by_schedule=name not in FROM_OTHER_SCHEDULES)
            _assert_close(runs[0], vectors[f"mb{i}/{name}"].reshape(shape), reach, f"mb{i}/{name}")


def test_updated_policy(vectors, steps):
    """Adam divides a gradient by its own size: near 0, its rounding errors become steps of the learning rate.

    Which parameters these are, and how far they go, the disturbed runs show one by one.
    """
    before, expected = (_flat(golden.policy_params(vectors, f"pol{i}/")) for i in (0, 1))
    first, *others = (_flat(step.params) for step in steps)
    spread = np.abs(np.stack(others) - first)
    error = np.abs(first - expected)
    assert error.max() <= 1e-5 + 3 * spread.max(), "updated parameters depart from the authors'"
    assert (error > 1e-5 + 3 * spread.max(0)).mean() <= 1e-3, "parameters depart that rounding leaves alone"
    share = (error > 1e-5).mean()
    assert share <= 1e-3 + 1.5 * (spread > 1e-5).mean(1).max(), f"{share:.2%} of the parameters depart"
    assert (np.abs(before - expected) > 1e-3).mean() > 0.5, "the recorded step hardly changes the policy"


def _flat(params: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
