"""One update as a pure function: blocks of text in, a better policy and metrics out.

`train_step` is the whole of it and is jitted once, with the state donated.  It has three parts, which
`sol_jax.rl.sharded_update` runs apart where there are several devices: `draw` everything random for the whole
batch; `play` the blocks, none of which knows of another; `learn` from what all of them gave.

Source: docs/method.md, "The episode" and "Learning"; arXiv 2605.10875 sections 3.3 and 4.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sol_jax.axes.base import ActionSpace
from sol_jax.models.llama import Weights
from sol_jax.rl.collect import collect, draw_budgets
from sol_jax.rl.counterfactual import (
    Outcomes,
    Schedules,
    collect_outcomes,
    draw_schedules,
    learn_losses,
    recalibrated,
)
from sol_jax.rl.grpo import stratified_places
from sol_jax.rl.learn import (
    Experience,
    TrainState,
    advantages,
    by_axis,
    fit,
    flattened,
    mean_metrics,
    minibatches,
    optimizer,
    prices,
)
from sol_jax.rl.policy import example_observation, initial_carry
from sol_jax.rl.rollout import Rollout, placed_controller, policy_controller
from sol_jax.rl.setup import Setup


class Drawn(NamedTuple):
    """All that is random about a batch of blocks, drawn for all of them before they are shared out."""

    early_B: jax.Array | None  # tokens by which episodes start earlier, with `episode.jitter`
    budget_BxWxX: jax.Array | None = None  # of GRPO
    key_BxWxK: jax.Array | None = None  # of each schedule's sampling, likewise
    schedules: Schedules | None = None  # of the counterfactual learner
    place_BxWxKxTxX: jax.Array | None = None  # of stratified sampling, see `grpo.action_at`


class Played(NamedTuple):
    """What GRPO learns from, [B, W, K, ...]: rollouts (without hidden states after steps) and rewards."""

    rollout: Rollout
    reward: jax.Array


def init_state(key: jax.Array, setup: Setup) -> TrainState:
    """A fresh policy and optimizer."""
    init_key, run_key = jax.random.split(key)
    params, opt_state = _first(init_key, setup)
    reference = jax.tree.map(jnp.copy, params) if setup.grpo.reference_kl_coef else None
    return TrainState(jnp.int32(0), run_key, params, opt_state, reference)


# Compiled as a whole: operation by operation it takes seconds.
@functools.partial(jax.jit, static_argnames="setup")
def _first(key: jax.Array, setup: Setup) -> tuple[optax.Params, optax.OptState]:
    example = example_observation(setup.policy), initial_carry(setup.policy)
    params = setup.network.init(key, *example, method="step")
    return params, optimizer(setup.optim).init(params)


def train_step(
    state: TrainState, weights: Weights, tokens_BxN: jax.Array, setup: Setup
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update on a batch of blocks; pure, and a function of (state, weights, tokens) alone."""
    drawn = draw(state.key, state.step, len(tokens_BxN), setup)
    return learn(state, play(state.params, weights, tokens_BxN, drawn, setup), drawn, setup)


def draw(key: jax.Array, step: jax.Array, num_blocks: int, setup: Setup) -> Drawn:
    """What the update of a number draws; `key` is the run's."""
    key, early_B = jax.random.fold_in(key, step), None
    budget_key, rollout_key, _ = jax.random.split(key, 3)
    if setup.episode.jitter:
        early_key = jax.random.fold_in(budget_key, 1)
        early_B = jax.random.randint(early_key, (num_blocks,), 0, setup.episode.jitter + 1)
    if setup.learner == "counterfactual":
        return Drawn(early_B, schedules=draw_schedules(key, step, num_blocks, setup))
    shape = num_blocks, setup.episode.episodes_per_prefix
    budget_BxWxX = draw_budgets(budget_key, shape, setup.space)
    key_BxWxK, place = jax.random.split(rollout_key, (*shape, setup.grpo.num_schedules)), None
    if setup.grpo.sampling == "stratified":
        steps = *shape, setup.episode.horizon, len(setup.space.axes)
        place_key = jax.random.fold_in(rollout_key, 1)
        place = jnp.moveaxis(stratified_places(place_key, steps, setup.grpo.num_schedules), -1, 2)
    return Drawn(early_B, budget_BxWxX, key_BxWxK, place_BxWxKxTxX=place)


def play(
    params: optax.Params, weights: Weights, tokens_BxN: jax.Array, drawn: Drawn, setup: Setup
) -> Played | Outcomes:
    """What the schedules of every block do; each block by itself, so any part of a batch can be played."""
    if drawn.schedules is not None:
        return collect_outcomes(params, weights, tokens_BxN, drawn.schedules, drawn.early_B, setup)
    assert drawn.budget_BxWxX is not None
    assert drawn.key_BxWxK is not None
    how = setup.network, params, setup.grpo.temperature
    if drawn.place_BxWxKxTxX is None:
        controller = policy_controller(*how)
    else:
        controller = placed_controller(*how, setup.space.level_counts)
    asked = drawn.budget_BxWxX, setup, drawn.early_B, drawn.place_BxWxKxTxX
    rollout, reward = collect(weights, controller, tokens_BxN, drawn.key_BxWxK, *asked)
    return Played(rollout._replace(hidden=rollout.hidden[..., :0]), reward)


def learn(
    state: TrainState, played: Played | Outcomes, drawn: Drawn, setup: Setup
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The policy after the update, and what to log of it."""
    key = jax.random.fold_in(state.key, state.step)
    if isinstance(played, Outcomes):
        state, metrics = learn_losses(state, played, key, setup)
    else:
        assert drawn.budget_BxWxX is not None
        state, metrics = learn_grpo(state, played, drawn.budget_BxWxX, key, setup)
    # Also what shows a parameter that this update made NaN or infinite, before it is saved.
    return state, metrics | {"policy/param_norm": optax.tree.norm(state.params)}


def learn_grpo(
    state: TrainState, played: Played, budget_BxWxX: jax.Array, key: jax.Array, setup: Setup
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The paper's: compare K sampled schedules of every episode."""
    rollout, reward = played
    *_, order_key = jax.random.split(key, 3)
    adv, penalty, mean_cost = advantages(reward, rollout, budget_BxWxX, setup)
    price = prices(reward, rollout, budget_BxWxX, setup)
    experience = Experience(rollout.observation, rollout.action, rollout.logp, adv, price)
    if setup.grpo.credit == "axis":
        experience = by_axis(state.params, experience, rollout.cost, setup)
    experience = flattened(experience)
    order = minibatches(order_key, adv.size // adv.shape[-1], setup.optim, setup.episode.horizon)
    state, fitted_J = fit(state, experience, *order, setup)
    if setup.policy.config.predict_losses:
        params = recalibrated(state.params, experience.observation, state.step, setup, asked=True)
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
