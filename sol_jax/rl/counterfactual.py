"""Learning from counterfactuals: every level of a step is tried on the same token, and its loss is predicted.

Teacher-forced text shows what any level of a step would have done, so nothing need be left to sampling: the K
schedules of an episode take the levels of each axis in random order, each as often as any other, and the
policy learns what every level costs in likelihood.  Actions then follow from the predictions and a price per
axis (see `loss_head`), so that the same network serves any budget.

Not the paper's.  Source: docs/method.md, "Learning from counterfactuals".
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sol_jax.axes.base import ActionSpace
from sol_jax.models.llama import Weights
from sol_jax.rl import loss_head
from sol_jax.rl.collect import beside_dense, prefill_blocks, run_schedules, score_labels
from sol_jax.rl.learn import Loss, TrainState, descend, flattened, mean_metrics, minibatches
from sol_jax.rl.policy import Observation, join_scores
from sol_jax.rl.rollout import dense_divergence, replay
from sol_jax.rl.setup import Setup


class Outcomes(NamedTuple):
    """What the steps of one schedule lost, with batch axes before."""

    observation: Observation  # before each step
    action: jax.Array  # [T], taken
    loss: jax.Array  # [T], nats


def draw_schedules(key: jax.Array, num_blocks: int, setup: Setup) -> jax.Array:
    """Permuted schedules of every episode of so many blocks, [B, W, K, T]."""
    shape = num_blocks, setup.episode.episodes_per_prefix, setup.episode.horizon
    action_key, _ = jax.random.split(key)
    permuted = permuted_actions(action_key, shape, setup.grpo.num_schedules, setup.space)
    return jnp.moveaxis(permuted, -1, 2)


def collect_outcomes(
    weights: Weights,
    tokens_BxN: jax.Array,
    action_BxWxKxT: jax.Array,
    early_B: jax.Array | None,
    setup: Setup,
) -> Outcomes:
    """What K given schedules of every episode of a batch of blocks lose, [B, W, K, T, ...]."""
    blocks = prefill_blocks(weights, tokens_BxN, setup, setup.needs_dense, early_B)
    no_budget = jnp.zeros((*action_BxWxKxT.shape[:-1], len(setup.space.axes)))
    nothing_drawn = jax.random.key(0)
    rollout = run_schedules(weights, blocks, nothing_drawn, no_budget, replay(action_BxWxKxT), setup)
    rows = setup.memory.head_rows
    if blocks.dense_hidden is not None:
        loss = beside_dense(dense_divergence, weights, rollout.hidden, blocks.dense_hidden, rows)
    else:
        loss = -score_labels(weights, rollout.hidden, blocks.episodes.label, rows)
    taken = jnp.where(rollout.controllable, action_BxWxKxT, setup.space.dense)
    return Outcomes(rollout.observation, taken, loss)


def learn_losses(
    state: TrainState, outcomes: Outcomes, key: jax.Array, setup: Setup
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Learns to predict what was lost, and takes stock of what prices buy."""
    _, order_key = jax.random.split(key)
    outcomes = flattened(outcomes)
    order = minibatches(order_key, len(outcomes.loss), setup.optim, setup.episode.horizon)
    state, fitted_J = descend(state, prediction_loss(setup), outcomes, *order, setup.optim)
    params = recalibrated(state.params, outcomes.observation, state.step, setup)
    return state._replace(params=params), mean_metrics(fitted_J)


def prediction_loss(setup: Setup) -> Loss:
    """How far predictions are from what was lost: the gamma deviance, whose minimum is the mean.

    Losses of steps differ by orders of magnitude; it weighs each miss by what was predicted.
    """
    floor = setup.counterfactual.floor

    def loss(params: Any, batch: Outcomes, weight_R: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        rest, losses = _predict(params, batch.observation, setup)
        joint = join_scores(jnp.concatenate(losses, -1), setup.policy.level_counts)
        predicted = rest + jnp.take_along_axis(joint, batch.action[..., None], -1)[..., 0]
        ratio = (batch.loss + floor) / (predicted + floor)
        share = jnp.broadcast_to(weight_R[:, None], ratio.shape)
        share /= share.sum()
        value = jnp.sum(share * (ratio - 1 - jnp.log(ratio)))
        means = {"lost": jnp.sum(share * batch.loss), "predicted": jnp.sum(share * predicted)}
        return value, {"loss": value} | means

    return loss


def recalibrated(params: Any, observation: Observation, updates: jax.Array, setup: Setup) -> Any:
    """Parameters whose tables have moved towards these observations.

    They say what each price buys on average, and what each level loses.
    """
    _, losses = _predict(params, observation, setup)
    flat = [loss.reshape(-1, loss.shape[-1]) for loss in losses]
    costs = [jnp.array(cost_n) for cost_n in setup.policy.level_costs]
    now = {
        "cost": jnp.stack(list(map(loss_head.mean_costs, flat, costs))),
        "loss": jnp.concatenate([loss.mean(0) for loss in flat]),
    }
    share = jnp.maximum(1 / updates, 1 / setup.counterfactual.price_memory)
    known = params["prices"]
    return {**params, "prices": jax.tree.map(lambda old, new: old + share * (new - old), known, now)}


def _predict(params: Any, observation: Observation, setup: Setup) -> tuple[jax.Array, list[jax.Array]]:
    """The rest [R, T] and each axis' losses [R, T, n] of R schedules."""
    apply = functools.partial(setup.network.apply, params, method="losses")
    predicted: Any = jax.vmap(apply)(observation)
    return predicted


def permuted_actions(
    key: jax.Array, shape: tuple[int, ...], num_schedules: int, space: ActionSpace
) -> jax.Array:
    """Joint actions [*shape, K]: along K, each axis has each of its levels K / levels times, in random order.

    What does not divide goes to levels drawn anew each time, and the axes are independent of each other.
    """
    K = num_schedules

    def one(key: jax.Array) -> jax.Array:
        def levels(key: jax.Array, count: int) -> jax.Array:
            rest_key, order_key = jax.random.split(key)
            rest = jax.random.permutation(rest_key, count)[: K % count]
            whole = jnp.tile(jnp.arange(count), K // count)
            return jax.random.permutation(order_key, jnp.concatenate([whole, rest]))

        keys = jax.random.split(key, len(space.axes))
        each = [levels(k, len(axis.levels)) for k, axis in zip(keys, space.axes, strict=True)]
        return space.join(jnp.stack(each, -1)).astype(jnp.int32)

    keys = jax.random.split(key, shape)
    for _ in shape:
        one = jax.vmap(one)
    return one(keys)
