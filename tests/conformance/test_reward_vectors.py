"""Rewards, advantages, loss and whole optimizer steps against the authors' training code."""

import functools
import re
from typing import Any, NamedTuple

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sol_jax.rl import grpo, rewards
from sol_jax.rl.config import OptimConfig
from sol_jax.rl.learn import minibatches, optimizer
from sol_jax.rl.policy import Observation, Policy, budget_gap, initial_carry, progress

AXES = ("tok", "pru", "q")
TRAIN_STEPS = ("quest_sum_process", "recency_kl_outcome", "quest_short_ctx")


class Signal(NamedTuple):
    """Every stage from rewards to advantages, for B sequences of K schedules."""

    return_BxKxT: jax.Array
    gap_BxKxX: jax.Array
    penalty_BxKxX: jax.Array
    total_BxKxT: jax.Array
    adv_BxKxT: jax.Array


@functools.partial(jax.jit, static_argnames=("gamma", "how", "level", "norm", "whiten"))
def _signal(reward, cost, controllable, budget, weight_X, *, gamma, how, level, norm, whiten) -> Signal:
    """`reward_BxKxT`, `cost_BxKxTxX`, `controllable_BxKxT`, `budget_BxKxX` -> advantages."""

    def per_schedule(reward_T, cost_TxX, controllable_T, budget_X):
        return_T = rewards.returns(reward_T, gamma, how, level)
        mean_cost_X = rewards.axis_costs(cost_TxX, controllable_T)
        penalty_X = rewards.budget_penalty(mean_cost_X, budget_X, weight_X)
        return return_T, mean_cost_X - budget_X, penalty_X, return_T - penalty_X.sum()

    stages = jax.vmap(jax.vmap(per_schedule))(reward, cost, controllable, budget)
    adv_BxKxT = jax.vmap(lambda x_KxT: grpo.group_advantage(x_KxT, level, norm))(stages[-1])
    return Signal(*stages, grpo.whiten(adv_BxKxT) if whiten else adv_BxKxT)


def _time_last(array_TxN, num_sequences):
    """[T, B * K, ...] -> [B, K, T, ...]; the K schedules of a sequence are neighbours."""
    by_schedule = jnp.moveaxis(jnp.asarray(array_TxN), 0, 1)
    return by_schedule.reshape(num_sequences, -1, *by_schedule.shape[1:])


def _time_first(array_BxKxT):
    """The way back: [B, K, T] -> [T, B * K]."""
    return array_BxKxT.reshape(-1, array_BxKxT.shape[-1]).T


def _rounding(total_BxKxT, level, norm, whiten) -> float:
    """How far float32 rounding of the totals alone may move an advantage: they nearly cancel in it."""
    score = np.asarray(total_BxKxT, np.float64)
    score = score if level == "process" else score.sum(axis=2, keepdims=True)
    rounding = 2 * np.finfo(np.float32).eps * np.abs(score).max()
    advantage = score - score.mean(axis=1, keepdims=True)
    if norm == "zscore":
        std = score.std(axis=1, keepdims=True)
        advantage, rounding = advantage / std, rounding / std.min()
    return rounding / advantage.std() if whiten else rounding


# --- f1: inline arithmetic of one batch ---------------------------------------------------------


def _split(case: str) -> dict[str, str]:
    eff, p_max, how, level, norm, whiten = case.split("_")
    return {
        "eff": eff,
        "p_max": p_max.removeprefix("pmax"),
        "how": how,
        "level": level,
        "norm": norm,
        "whiten": whiten.removeprefix("wh"),
    }


def test_advantages():
    vectors = golden.load("f1_advantage")
    num_sequences = int(vectors["B"])
    budget_NxX = np.stack([vectors[f"C_{axis}"] for axis in AXES], axis=-1)
    assert len(vectors["cases"])
    checked = set()
    for case in vectors["cases"]:
        setting = _split(case)
        # P_MAX is no cap on a penalty: it is the largest pruning level, the unit of that axis' cost.
        cost_TxNxX = np.stack(
            [vectors["keep"], vectors["prune"] / np.float32(setting["p_max"]), vectors["qratio"]], axis=-1
        )
        signal = _signal(
            _time_last(vectors["r_task"], num_sequences),
            _time_last(cost_TxNxX, num_sequences),
            _time_last(vectors[f"eff_{setting['eff']}"], num_sequences),
            jnp.asarray(budget_NxX).reshape(num_sequences, -1, len(AXES)),
            jnp.asarray(vectors["alpha"], jnp.float32),
            gamma=float(vectors["gamma"]),
            how=setting["how"],
            level=setting["level"],
            norm=setting["norm"],
            whiten=setting["whiten"] == "1",
        )
        stages = {
            "x_for_adv": _time_first(signal.return_BxKxT),
            "r_total": _time_first(signal.total_BxKxT),
            "adv": _time_first(signal.adv_BxKxT),
        }
        if f"{case}/gaps" in vectors:
            alpha_X = np.asarray(vectors["alpha"], np.float32)
            stages["gaps"] = signal.gap_BxKxX.reshape(-1, len(AXES)).T
            stages["costs"] = (signal.penalty_BxKxX / alpha_X).reshape(-1, len(AXES)).T
        rounding = _rounding(signal.total_BxKxT, setting["level"], setting["norm"], setting["whiten"] == "1")
        for stage, value in stages.items():
            atol = 1e-5 + (rounding if stage == "adv" else 0.0)
            golden.assert_close(value, vectors[f"{case}/{stage}"], f"{case}/{stage}", atol=atol)
            checked.add(f"{case}/{stage}")
    assert checked == {name for name in vectors if "/" in name}


# --- f2: the loss of one minibatch --------------------------------------------------------------


def test_clipped_loss():
    vectors = golden.load("f2_ppo_loss")
    settings = sorted({name.split("/")[0] for name in vectors if "/" in name})
    assert settings
    for setting in settings:
        clip, entropy_coef = (float(x) for x in re.fullmatch(r"clip(.+)_ec(.+)", setting).groups())

        def loss(logits_NxA, clip=clip, entropy_coef=entropy_coef):
            return grpo.clipped_loss(
                logits_NxA,
                jnp.asarray(vectors["actions"]),
                jnp.asarray(vectors["logp_old"]),
                jnp.asarray(vectors["adv"]),
                clip=clip,
                entropy_coef=entropy_coef,
            )

        logits_NxA = jnp.asarray(vectors["logits_new"])
        grad_NxA, metrics = jax.grad(loss, has_aux=True)(logits_NxA)
        logp_N = jax.vmap(grpo.action_logp)(logits_NxA, jnp.asarray(vectors["actions"]))
        ratio_N = jnp.exp(logp_N - vectors["logp_old"])
        actual = {
            "policy_loss": metrics["policy_loss"],
            "entropy": metrics["entropy"],
            "loss": metrics["loss"],
            "ratio": ratio_N,
            "grad": grad_NxA,
            "grad_norm": optax.tree.norm(grad_NxA),
        }
        assert {f"{setting}/{name}" for name in actual} == {n for n in vectors if n.startswith(f"{setting}/")}
        for name, value in actual.items():
            golden.assert_close(value, vectors[f"{setting}/{name}"], f"{setting}/{name}")
        clipped = np.abs(vectors[f"{setting}/ratio"] - 1) > clip
        golden.assert_close(metrics["clip_share"], clipped.mean(), f"{setting}: share of clipped ratios")


# --- f3: a whole training step ------------------------------------------------------------------


@pytest.fixture(scope="module", params=TRAIN_STEPS)
def vectors(request):
    return golden.load(f"f3_train_step_{request.param}")


def _policy(vectors) -> Policy:
    return Policy(golden.policy_spec(vectors, "pol0/", golden.config_of(vectors)["policy_n_heads"]))


def _observations(vectors) -> Observation:
    """[N, T, ...]: one episode per schedule of the batch."""
    return golden.observations(vectors, "_seq")


def _budget_NxX(vectors):
    budget_BxX = np.stack([vectors[f"C_{axis}_target_B"] for axis in ("tok", "pru", "qratio")], axis=-1)
    return jnp.asarray(np.repeat(budget_BxX, int(vectors["K"]), axis=0))


def _cost_TxNxX(vectors):
    prune_cost = vectors["prune_all"] / np.float32(vectors["act_prune"].max())
    return np.stack([vectors["keep_all"], prune_cost, vectors["qratio_all"]], axis=-1)


def _weight_X(vectors):
    cfg = golden.config_of(vectors)
    levels = [vectors[name] for name in ("act_keep", "act_prune", "act_bits")]
    alpha = [cfg[name] for name in ("alpha_tok", "alpha_prune", "alpha_quant")]
    return jnp.asarray(
        [a if len(np.unique(axis)) > 1 else 0.0 for a, axis in zip(alpha, levels, strict=True)]
    )


def test_scalars(vectors):
    def episode(cost_TxX, controllable_T, budget_X):
        def step(taken, inputs):
            cost_sum_X, num_counted = taken
            index, cost_X, controllable = inputs
            single_2 = jnp.stack([progress(index, controllable_T.size), jnp.float32(controllable)])
            gap_X = budget_gap(cost_sum_X, num_counted, budget_X)
            scalars = jnp.concatenate([single_2, jnp.float32(budget_X), gap_X])
            return (cost_sum_X + controllable * cost_X, num_counted + controllable), scalars

        steps = (jnp.arange(controllable_T.size), cost_TxX, controllable_T)
        return jax.lax.scan(step, (jnp.zeros_like(budget_X), 0.0), steps)[1]

    scalars_TxNxS = jax.vmap(episode, (1, 1, 0), 1)(
        jnp.asarray(_cost_TxNxX(vectors)), jnp.asarray(vectors["eff_all"]), _budget_NxX(vectors)
    )
    golden.assert_close(scalars_TxNxS, vectors["scalars_seq"], "scalars")


def test_returns_penalties_and_advantages(vectors):
    cfg, num_sequences = golden.config_of(vectors), int(vectors["B"])
    weight_X = _weight_X(vectors)
    signal = _signal(
        _time_last(vectors["r_task_all"], num_sequences),
        _time_last(_cost_TxNxX(vectors), num_sequences),
        _time_last(vectors["eff_all"], num_sequences),
        _budget_NxX(vectors).reshape(num_sequences, -1, len(AXES)),
        weight_X,
        gamma=cfg["reward_gamma"],
        how=cfg["reward_agg"] or "none",
        level=cfg["grpo_level"],
        norm=cfg["grpo_norm"],
        whiten=cfg["adv_whiten_global"],
    )
    golden.assert_close(_time_first(signal.return_BxKxT), vectors["x_for_adv"], "x_for_adv")
    unweighted_XxN = (signal.penalty_BxKxX / weight_X).reshape(-1, len(AXES)).T
    for axis, penalty_N in zip(("tok", "pru", "qratio"), unweighted_XxN, strict=True):
        golden.assert_close(penalty_N, vectors[f"cost_{axis}_seq"], f"cost_{axis}_seq")
    golden.assert_close(_time_first(signal.total_BxKxT), vectors["r_total"], "r_total")
    rounding = _rounding(signal.total_BxKxT, cfg["grpo_level"], cfg["grpo_norm"], cfg["adv_whiten_global"])
    golden.assert_close(_time_first(signal.adv_BxKxT), vectors["adv"], "adv", atol=1e-5 + rounding)


def test_logp_of_the_rollout(vectors):
    """The policy before the update, step by step with its cache, gave the sampled actions these."""
    model, temperature = _policy(vectors), golden.config_of(vectors)["pi_temperature"]
    params = golden.policy_params(vectors, "pol0/")

    def episode(obs_T, action_T):
        def step(carry, inputs):
            obs, action = inputs
            logits_A, carry = model.apply(params, obs, carry, method="step")
            return carry, grpo.action_logp(logits_A / temperature, action)

        return jax.lax.scan(step, initial_carry(model.spec), (obs_T, action_T))[1]

    logp_NxT = jax.vmap(episode)(_observations(vectors), jnp.asarray(vectors["actions_seq"].T))
    golden.assert_close(logp_NxT.T, vectors["logp_old_seq"], "logp_old_seq")


class Minibatch(NamedTuple):
    """Schedules of one minibatch; the steps flattened as the authors do, time outermost."""

    obs_MxT: Observation
    action_N: jax.Array
    logp_old_N: jax.Array
    adv_N: jax.Array


def _minibatch(vectors, index_M) -> Minibatch:
    flat = (vectors[name][:, index_M].reshape(-1) for name in ("actions_seq", "logp_old_seq", "adv"))
    return Minibatch(
        jax.tree.map(lambda field: field[index_M], _observations(vectors)), *map(jnp.asarray, flat)
    )


def _loss(params, batch: Minibatch, model: Policy, cfg):
    """The loss, and what else was recorded of a minibatch, under the authors' names."""
    logits_MxTxA = jax.vmap(model.apply, (None, 0))(params, batch.obs_MxT) / cfg["pi_temperature"]
    logits_TxMxA = logits_MxTxA.swapaxes(0, 1)
    logits_NxA = logits_TxMxA.reshape(-1, logits_TxMxA.shape[-1])
    loss, metrics = grpo.clipped_loss(
        logits_NxA,
        batch.action_N,
        batch.logp_old_N,
        batch.adv_N,
        clip=cfg["ppo_clip"],
        entropy_coef=cfg["entropy_coef"],
    )
    logp_new_N = jax.vmap(grpo.action_logp)(logits_NxA, batch.action_N)
    recorded = {
        "logits_seq": logits_TxMxA,
        "logp_new": logp_new_N,
        "logp_old": batch.logp_old_N,
        "ratio": jnp.exp(logp_new_N - batch.logp_old_N),
        "adv_flat": batch.adv_N,
        **{name: metrics[name] for name in ("policy_loss", "entropy", "loss")},
    }
    return loss, recorded


def _optim(cfg: dict[str, Any]) -> OptimConfig:
    return OptimConfig(
        learning_rate=cfg["lr"],
        weight_decay=0.01,
        clip_norm=cfg["max_grad_norm"],
        minibatch_steps=cfg["ppo_minibatch_size"],
        accumulate=cfg["grad_accum_steps"],
    )


def _train(vectors, rounding: float = 0.0):
    """All minibatches of the file: what was recorded of each, and the updated parameters.

    `rounding` disturbs each gradient by that share of its tensor's typical size.
    """
    cfg, model = golden.config_of(vectors), _policy(vectors)
    tx, every = optimizer(_optim(cfg)), cfg["grad_accum_steps"]
    gradient = jax.jit(jax.grad(functools.partial(_loss, model=model, cfg=cfg), has_aux=True))
    step = jax.jit(tx.update)
    params = jax.tree.map(jnp.asarray, golden.policy_params(vectors, "pol0/"))
    opt_state, rng = tx.init(params), np.random.default_rng(0)
    zeros = gathered = jax.tree.map(jnp.zeros_like, params)
    recorded_J = []
    for i in range(int(vectors["n_minibatches"])):
        grads, recorded = gradient(params, _minibatch(vectors, vectors[f"mb{i}/mb_idx"]))
        grads = jax.tree.map(lambda g: _disturbed(g, rounding, rng), grads)
        # The authors gather the mean over the minibatches, each counting the same, however small the last.
        gathered = jax.tree.map(lambda total, g: total + g / every, gathered, grads)
        recorded["grad_flat_norm_per_param"] = _norms_per_param(gathered, vectors["param_names"])
        recorded["grad_norm_preclip"] = optax.tree.norm(gathered)
        recorded_J.append(recorded)
        if (i + 1) % every == 0:
            gathered = zeros
        updates, opt_state = step(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return recorded_J, params


def _disturbed(grad, rounding, rng):
    noise = rng.normal(size=grad.shape).astype(np.float32)
    return grad + rounding * jnp.sqrt(jnp.square(grad).mean()) * noise * (grad != 0)


def _norms_per_param(grads, names):
    """In the authors' order, 0 for their unused value head."""
    paths = [golden.policy_path(str(name)) for name in names]
    return np.array([0.0 if path is None else jnp.linalg.norm(_get(grads, path)) for path in paths])


def _get(tree, path):
    return functools.reduce(lambda node, key: node[key], path, tree["params"])


def test_minibatches_are_cut_as_theirs(vectors):
    """Whole schedules, as many to a minibatch; the last one may be smaller, here by weights of 0."""
    num_steps, num_schedules = vectors["actions_seq"].shape
    optim = _optim(golden.config_of(vectors))
    index_JxR, weight_JxR = minibatches(jax.random.key(0), num_schedules, optim, num_steps)
    theirs = [vectors[f"mb{i}/mb_idx"] for i in range(int(vectors["n_minibatches"]))]
    np.testing.assert_array_equal(weight_JxR.sum(1), [len(index_M) for index_M in theirs])
    # Which schedules share a minibatch is drawn; each of them is in one.
    for order in (index_JxR[weight_JxR == 1], np.concatenate(theirs)):
        np.testing.assert_array_equal(np.sort(order), np.arange(num_schedules))


def test_minibatches_up_to_the_updated_policy(vectors):
    """Everything recorded of every minibatch, and the parameters after the last, within 1e-5.

    Adam divides a gradient by its own size: where that size is near rounding, rounding errors come out as
    large as the learning rate, in these parameters and in all that follows.  How far is measured, by a second
    run whose gradients are disturbed by 3e-7, and three times that is allowed on top (nothing, before the
    first update).
    """
    recorded_J, params = _train(vectors)
    disturbed_J, disturbed_params = _train(vectors, rounding=3e-7)
    for i, (recorded, disturbed) in enumerate(zip(recorded_J, disturbed_J, strict=True)):
        for name, value in recorded.items():
            slack = np.abs(value - disturbed[name]).max() if i else 0.0
            golden.assert_close(value, vectors[f"mb{i}/{name}"], f"mb{i}/{name}", atol=1e-5 + 3 * slack)

    leaves = [_flat(tree) for tree in (params, disturbed_params, golden.policy_params(vectors, "pol1/"))]
    actual_N, disturbed_N, expected_N = leaves
    error_N, slack_N = np.abs(actual_N - expected_N), np.abs(actual_N - disturbed_N)
    assert error_N.max() <= 1e-5 + 3 * slack_N.max(), "updated parameters depart from the authors'"
    assert (error_N > 1e-5).mean() <= 1e-3 + 3 * (slack_N > 1e-5).mean(), "too many parameters depart"


def _flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_value_head_only_decays(vectors):
    """Why leaving it out is sound: no gradient reaches it, and our AdamW would shrink it as theirs does."""
    tx, head = optimizer(_optim(golden.config_of(vectors))), jnp.asarray(vectors["pol0/v.weight"])
    opt_state = tx.init(head)
    for _ in range(int(vectors["n_minibatches"])):
        updates, opt_state = tx.update(jnp.zeros_like(head), opt_state, head)
        head = optax.apply_updates(head, updates)
    golden.assert_close(head, vectors["pol1/v.weight"], "value head", rtol=1e-6, atol=1e-8)
