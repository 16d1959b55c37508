"""One GRPO update as a pure function: blocks of text in, a better policy and metrics out.

`train_step` is the whole of it (prefill, rollout, rewards, advantages, minibatches) and is jitted once,
with the state donated.  Its halves are in `collect` and `learn`.

Source: docs/method.md, "The episode" and "Learning"; arXiv 2605.10875 sections 3.3 and 4.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from sol_jax.axes.base import ActionSpace
from sol_jax.models.llama import Weights
from sol_jax.rl.collect import collect, draw_budgets
from sol_jax.rl.counterfactual import counterfactual_update, recalibrated
from sol_jax.rl.learn import (
    Experience,
    TrainState,
    advantages,
    fit,
    flattened,
    mean_metrics,
    minibatches,
    optimizer,
    prices,
)
from sol_jax.rl.policy import example_observation, initial_carry
from sol_jax.rl.rollout import policy_controller
from sol_jax.rl.setup import Setup


def init_state(key: jax.Array, setup: Setup) -> TrainState:
    """A fresh policy and optimizer."""
    init_key, run_key = jax.random.split(key)
    example = example_observation(setup.policy), initial_carry(setup.policy)
    params = setup.network.init(init_key, *example, method="step")
    reference = jax.tree.map(jnp.copy, params) if setup.grpo.reference_kl_coef else None
    return TrainState(jnp.int32(0), run_key, params, optimizer(setup.optim).init(params), reference)


def train_step(
    state: TrainState, weights: Weights, tokens_BxN: jax.Array, setup: Setup
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update on a batch of blocks; pure, and a function of (state, weights, tokens) alone."""
    key, early_B = jax.random.fold_in(state.key, state.step), None
    if setup.episode.jitter:
        budget_key = jax.random.split(key, 3)[0]
        early_B = jax.random.randint(
            jax.random.fold_in(budget_key, 1), (len(tokens_BxN),), 0, setup.episode.jitter + 1
        )
    update = counterfactual_update if setup.learner == "counterfactual" else grpo_update
    state, metrics = update(state, weights, tokens_BxN, key, early_B, setup)
    # Also what shows a parameter that this update made NaN or infinite, before it is saved.
    return state, metrics | {"policy/param_norm": optax.tree.norm(state.params)}


def grpo_update(
    state: TrainState,
    weights: Weights,
    tokens_BxN: jax.Array,
    key: jax.Array,
    early_B: jax.Array | None,
    setup: Setup,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The paper's: compare K sampled schedules of every episode."""
    B, W = len(tokens_BxN), setup.episode.episodes_per_prefix
    budget_key, rollout_key, order_key = jax.random.split(key, 3)
    budget_BxWxX = draw_budgets(budget_key, (B, W), setup.space)
    controller = policy_controller(setup.network, state.params, setup.grpo.temperature)
    rollout, reward = collect(weights, controller, tokens_BxN, rollout_key, budget_BxWxX, setup, early_B)
    adv, penalty, mean_cost = advantages(reward, rollout, budget_BxWxX, setup)
    price = prices(reward, rollout, budget_BxWxX, setup)
    experience = Experience(rollout.observation, rollout.action, rollout.logp, adv, price)
    experience = flattened(experience)
    order = minibatches(order_key, adv.size // adv.shape[-1], setup.optim, setup.episode.horizon)
    state, fitted_J = fit(state, experience, *order, setup)
    if setup.policy.config.predict_losses:
        params = recalibrated(state.params, experience.observation, state.step, setup)
        state = state._replace(params=params)
    metrics = mean_metrics(fitted_J)
    metrics |= _episode_metrics(reward, penalty, mean_cost, budget_BxWxX[:, :, None], setup.space)
    return state, metrics


def _episode_metrics(
    reward: jax.Array, penalty: jax.Array, mean_cost: jax.Array, budget: jax.Array, space: ActionSpace
) -> dict[str, jax.Array]:
    """Batch means: reward per step in nats; per axis the penalty, realised cost and missed budget."""
    metrics = {"reward": jnp.mean(reward), "penalty": jnp.mean(jnp.sum(penalty, -1))}
    for x, axis in enumerate(space.axes):
        metrics[f"penalty/{axis.name}"] = jnp.mean(penalty[..., x])
        metrics[f"cost/{axis.name}"] = jnp.mean(mean_cost[..., x])
        metrics[f"budget_gap/{axis.name}"] = jnp.mean(jnp.abs(mean_cost[..., x] - budget[..., x]))
    return metrics


jit_train_step = functools.partial(jax.jit, static_argnames="setup", donate_argnums=0)(train_step)
