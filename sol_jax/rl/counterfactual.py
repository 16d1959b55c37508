"""Learning from counterfactuals: every level of a step is tried on the same token, and its loss is predicted.

Teacher-forced text shows what any level of a step would have done, so nothing need be left to sampling: the K
schedules of an episode take the levels of each axis in random order, each as often as any other, and the
policy learns what every level costs in likelihood.  Actions then follow from the predictions and a price per
axis (see `loss_head`), so that the same network serves any budget.  At the end what a price buys is counted
on schedules that the policy plays itself, since a budget that is kept leaves another past than random levels.

Not the paper's.  Source: docs/method.md, "Learning from counterfactuals".
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sol_jax.axes.base import ActionSpace
from sol_jax.models.llama import Weights
from sol_jax.rl import loss_head
from sol_jax.rl.collect import beside_dense, prefill_blocks, run_schedules, score_labels
from sol_jax.rl.learn import Loss, TrainState, descend, flattened, mean_metrics, minibatches
from sol_jax.rl.policy import Observation, Policy, join_scores
from sol_jax.rl.rollout import Controller, dense_divergence, policy_controller, replay
from sol_jax.rl.setup import Setup


class Outcomes(NamedTuple):
    """What the steps of one schedule lost, with batch axes before."""

    observation: Observation  # before each step
    action: jax.Array  # [T], taken
    loss: jax.Array  # [T], nats


class Schedules(NamedTuple):
    """K schedules of every episode, given or played by the policy."""

    action_BxWxKxT: jax.Array  # `OWN` where the policy acts
    asked_BxWxKxX: jax.Array  # mean costs that it is asked for there, else 0


OWN = -1


def draw_schedules(key: jax.Array, step: jax.Array, num_blocks: int, setup: Setup) -> Schedules:
    """Schedules of every episode of so many blocks: permuted, or the policy's own at random budgets."""
    episodes, K = (num_blocks, setup.episode.episodes_per_prefix), setup.grpo.num_schedules
    action_key, asked_key = jax.random.split(key)
    permuted = permuted_actions(action_key, (*episodes, setup.episode.horizon), K, setup.space)
    asked, own = draw_requests(asked_key, (*episodes, K), setup.space), counting(step, setup)
    return Schedules(jnp.where(own, OWN, jnp.moveaxis(permuted, -1, 2)), jnp.where(own, asked, 0.0))


def counting(step: jax.Array, setup: Setup) -> jax.Array:
    """Whether the update after `step` others learns nothing and counts what prices buy."""
    after = setup.counterfactual.count_after
    return (step >= after) & (after > 0)


def draw_requests(key: jax.Array, shape: tuple[int, ...], space: ActionSpace) -> jax.Array:
    """Mean costs to ask for, [*shape, X], over the range of each axis.

    Half of them are the same part of each range up, as people ask for less or more of all: what an axis needs
    depends on what the others spend.
    """
    part_key, together_key = jax.random.split(key)
    part = jax.random.uniform(part_key, (*shape, len(space.axes)))
    together = jax.random.bernoulli(together_key, shape=(*shape, 1))
    low_X, high_X = (jnp.array([axis.budget[end] for axis in space.axes]) for end in (0, 1))
    return low_X + jnp.where(together, part[..., :1], part) * (high_X - low_X)


def collect_outcomes(
    params: Any,
    weights: Weights,
    tokens_BxN: jax.Array,
    schedules: Schedules,
    early_B: jax.Array | None,
    setup: Setup,
) -> Outcomes:
    """What K schedules of every episode of a batch of blocks lose, [B, W, K, T, ...]."""
    blocks = prefill_blocks(weights, tokens_BxN, setup, setup.needs_dense, early_B)
    nothing_drawn, given = jax.random.key(0), replay(schedules.action_BxWxKxT)
    controller = own_or_given(params, given, setup) if setup.counterfactual.count_after else given
    rollout = run_schedules(weights, blocks, nothing_drawn, schedules.asked_BxWxKxX, controller, setup)
    rows = setup.memory.head_rows
    if blocks.dense_hidden is not None:
        loss = beside_dense(dense_divergence, weights, rollout.hidden, blocks.dense_hidden, rows)
    else:
        loss = -score_labels(weights, rollout.hidden, blocks.episodes.label, rows)
    taken = jnp.where(rollout.controllable, rollout.action, setup.space.dense)
    return Outcomes(rollout.observation, taken, loss)


def own_or_given(params: Any, given: Controller, setup: Setup) -> Controller:
    """`given`, and the policy at steps where that says `OWN`; `given.memory` is of schedules [B, W, K, ...].

    The policy takes its best action at the prices of its budget, whatever was spent before: what is counted
    is what these prices buy.
    """
    spec = setup.policy
    held = dataclasses.replace(spec.config, restate=False, restate_steps=1, one_budget="")
    network = Policy(dataclasses.replace(spec, config=held, axis_shares=()))
    own = policy_controller(network, params, temperature=1.0, greedy=True)

    def act(key: jax.Array, seen: Observation, memory: Any) -> tuple[jax.Array, jax.Array, Any]:
        coming, carry = memory
        planned, _, coming = given.act(key, seen, coming)
        chosen, logp, carry = own.act(key, seen, carry)
        return jnp.where(planned == OWN, chosen, planned), logp, (coming, carry)

    shape = given.memory.shape[:-1]
    carries = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape, *leaf.shape)), own.memory)
    return Controller(act, (given.memory, carries))


def learn_losses(
    state: TrainState, outcomes: Outcomes, key: jax.Array, setup: Setup
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Learns to predict what was lost, and takes stock of what prices buy."""
    _, order_key = jax.random.split(key)
    outcomes, now_counting = flattened(outcomes), counting(state.step, setup)
    order = minibatches(order_key, len(outcomes.loss), setup.optim, setup.episode.horizon)
    learned, fitted_J = descend(state, prediction_loss(setup), outcomes, *order, setup.optim)
    if after := setup.counterfactual.count_after:
        # Learned and dropped again where it counts: one program for both, and learning is a small part of it.
        kept = jax.tree.map(
            lambda old, new: jnp.where(now_counting, old, new),
            (state.params, state.opt_state),
            (learned.params, learned.opt_state),
        )
        learned = learned._replace(params=kept[0], opt_state=kept[1])
    updates = jnp.where(now_counting, learned.step - after, learned.step)
    params = recalibrated(learned.params, outcomes.observation, updates, setup, now_counting)
    return learned._replace(params=params), mean_metrics(fitted_J)


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


def recalibrated(
    params: Any, observation: Observation, updates: jax.Array, setup: Setup, asked: jax.Array | bool
) -> Any:
    """Parameters whose tables have moved towards these observations [R, T].

    They say what each price buys on average, and what each level loses.  `updates` have moved them so far,
    this one included.  With `asked` the schedules were played for the budgets that the observations name, and
    a price is counted where about as much was asked for as it buys.
    """
    _, losses = _predict(params, observation, setup)
    flat = [loss.reshape(-1, loss.shape[-1]) for loss in losses]
    costs = [jnp.array(cost_n) for cost_n in setup.policy.level_costs]
    known = params["prices"]
    budget_XxN = observation.target.reshape(-1, len(costs)).T
    near_XxNxM = jnp.where(asked, jax.vmap(loss_head.nearness)(budget_XxN, known["cost"]), 1.0)
    now = {
        "cost": jnp.stack(list(map(loss_head.mean_costs, flat, costs, near_XxNxM))),
        "loss": jnp.concatenate([loss.mean(0) for loss in flat]),
    }
    share = jnp.maximum(1 / updates, 1 / setup.counterfactual.price_memory)
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
