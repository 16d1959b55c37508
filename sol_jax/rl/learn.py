"""The learning half of an update: from rewards to advantages, and the optimizer over minibatches.

Source: docs/method.md, "Learning"; arXiv 2605.10875 section 3.3.  `J` counts minibatches, `R` the schedules
of a minibatch.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sol_jax.axes.base import ActionSpace
from sol_jax.rl import grpo, rewards
from sol_jax.rl.config import OptimConfig
from sol_jax.rl.policy import Observation
from sol_jax.rl.rollout import Rollout
from sol_jax.rl.setup import Setup


class TrainState(NamedTuple):
    """Everything an update changes, and what it needs to be repeated exactly."""

    step: jax.Array  # updates done
    key: jax.Array  # of the run; each update folds its number in
    params: Any
    opt_state: Any
    reference: Any  # the frozen policy of `reference_kl_coef`, or None


class Experience(NamedTuple):
    """Rollouts as the loss needs them: of one schedule as named here, with batch axes before."""

    observation: Observation
    action: jax.Array  # [T]
    logp: jax.Array  # [T]; [T, X] of each axis' level with `credit` "axis"
    advantage: jax.Array  # likewise
    price: jax.Array | None = None  # [T, X], of each axis' expected cost, with `penalty_gradient` "expected"


def optimizer(cfg: OptimConfig) -> optax.GradientTransformation:
    """AdamW on the mean gradient of `accumulate` minibatches, clipped by its global norm."""
    rate: Any = cfg.learning_rate
    if cfg.decay_steps:
        rate = optax.warmup_cosine_decay_schedule(0.0, rate, cfg.warmup, cfg.decay_steps)
    elif cfg.warmup:
        rate = optax.linear_schedule(0.0, rate, cfg.warmup)
    chain = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm), optax.adamw(rate, weight_decay=cfg.weight_decay)
    )
    return optax.MultiSteps(chain, cfg.accumulate).gradient_transformation()


def advantages(
    reward_BxWxKxT: jax.Array, rollout: Rollout, budget_BxWxX: jax.Array, setup: Setup
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Advantages [B, W, K, T], and the budget penalties and mean costs [B, W, K, X] behind them."""
    adv, penalty, mean = _compare(reward_BxWxKxT, rollout, budget_BxWxX, setup)
    return grpo.whiten(adv) if setup.grpo.whiten else adv, penalty, mean


def prices(
    reward_BxWxKxT: jax.Array, rollout: Rollout, budget_BxWxX: jax.Array, setup: Setup
) -> jax.Array | None:
    """What a unit of each axis' cost at a step adds to the penalty of its schedule, [B, W, K, T, X].

    In the unit of the advantages; 0 where a step may not be controlled.  None if returns have the penalty.
    """
    cfg = setup.grpo
    if cfg.penalty_gradient == "sampled":
        return None
    adv, _, mean_BxWxKxX = _compare(reward_BxWxKxT, rollout, budget_BxWxX, setup)
    weight_X = _penalty_weights(setup.space)

    def slope(mean_X: jax.Array, budget_X: jax.Array) -> jax.Array:
        return jax.grad(lambda m: jnp.sum(rewards.budget_penalty(m, budget_X, weight_X, cfg.dead_zone)))(
            mean_X
        )

    over_schedules = jax.vmap(slope, in_axes=(0, None))
    slope_BxWxKxX = jax.vmap(jax.vmap(over_schedules))(mean_BxWxKxX, budget_BxWxX)
    counted = rollout.controllable[..., None].astype(jnp.float32)
    price = slope_BxWxKxX[..., None, :] * counted / jnp.maximum(counted.sum(-2, keepdims=True), 1.0)
    if cfg.level == "outcome":  # every step's advantage is then a sum over all of them
        price *= counted.shape[-2]
    if not cfg.whiten:
        return price
    # Budgets far off are worth no more than this: the policy would go to its ends before it learns anything.
    return jnp.clip(price / grpo.scale(adv), -cfg.max_price, cfg.max_price)


def _penalty_weights(space: ActionSpace) -> jax.Array:
    return jnp.array([axis.penalty_weight for axis in space.axes], jnp.float32)


def _compare(
    reward_BxWxKxT: jax.Array, rollout: Rollout, budget_BxWxX: jax.Array, setup: Setup
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`advantages` before whitening."""
    cfg, weight_X = setup.grpo, _penalty_weights(setup.space)

    def of_group(reward_KxT: jax.Array, cost_KxTxX: jax.Array, counted_KxT: jax.Array, budget_X: jax.Array):
        return_KxT = jax.vmap(lambda r: rewards.returns(r, cfg.gamma, cfg.returns, cfg.level))(reward_KxT)
        mean_KxX = jax.vmap(rewards.axis_costs)(cost_KxTxX, counted_KxT)
        penalty_KxX = jax.vmap(lambda m: rewards.budget_penalty(m, budget_X, weight_X, cfg.dead_zone))(
            mean_KxX
        )
        signal_KxT = cfg.quality_weight * return_KxT
        if cfg.penalty_gradient == "sampled":
            signal_KxT -= jnp.sum(penalty_KxX, -1, keepdims=True)
        return grpo.group_advantage(signal_KxT, cfg.level, cfg.norm), penalty_KxX, mean_KxX

    batched = jax.vmap(jax.vmap(of_group))
    return batched(reward_BxWxKxT, rollout.cost, rollout.controllable, budget_BxWxX)


def by_axis(params: Any, experience: Experience, cost: jax.Array, setup: Setup) -> Experience:
    """Experience [B, W, K, ...] with advantages and log-probabilities of each axis' level by itself.

    `params` are those of the rollout, `cost` what its steps cost, [B, W, K, T, X].
    """
    over_steps = jax.vmap(grpo.axis_advantage, in_axes=(1, 1), out_axes=1)
    advantage = jax.vmap(jax.vmap(over_steps))(experience.advantage, cost)
    sizes, temperature = setup.space.level_counts, setup.grpo.temperature

    def logp(observation: Observation, action_T: jax.Array) -> jax.Array:
        logits_TxA: Any = setup.network.apply(params, observation)
        return jax.vmap(lambda logits_A, a: grpo.axis_logp(logits_A / temperature, a, sizes))(
            logits_TxA, action_T
        )

    flat = flattened((experience.observation, experience.action))
    logp_old = lax.map(lambda given: logp(*given), flat, batch_size=32)  # joint logits are large
    return experience._replace(advantage=advantage, logp=logp_old.reshape(advantage.shape))


def minibatches(
    key: jax.Array, num_schedules: int, cfg: OptimConfig, horizon: int
) -> tuple[jax.Array, jax.Array]:
    """A random cut of all schedules of a batch into minibatches: indices and weights, [J, R] each.

    The last of a pass may be short; it is filled up with schedules of weight 0.
    """
    R = min(max(1, cfg.minibatch_steps // horizon), num_schedules)
    J = -(-num_schedules // R)
    slots = jnp.arange(J * R).reshape(J, R)
    keys = [key, *(jax.random.fold_in(key, p) for p in range(1, cfg.passes))]
    index = [jax.random.permutation(k, num_schedules)[slots % num_schedules] for k in keys]
    weight_JxR = (slots < num_schedules).astype(jnp.float32)
    return jnp.concatenate(index), jnp.tile(weight_JxR, (cfg.passes, 1))


def flattened(experience: Any) -> Any:
    """Experience [B, W, K, ...] with one leading axis, the schedules of the batch."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), experience)


# Of parameters and a minibatch with its weights: the loss, and what to log.
Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def descend(
    state: TrainState,
    loss: Loss,
    experience: Any,
    index_JxR: jax.Array,
    weight_JxR: jax.Array,
    cfg: OptimConfig,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """An optimizer's way through the minibatches; `experience` leads with the schedules of the batch."""
    tx = optimizer(cfg)

    def minibatch(carry: tuple, picked: tuple) -> tuple[tuple, dict[str, jax.Array]]:
        params, opt_state = carry
        index_R, weight_R = picked
        batch = jax.tree.map(lambda leaf: leaf[index_R], experience)
        grads, metrics = jax.grad(loss, has_aux=True)(params, batch, weight_R)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        # What is counted rather than learned (`loss_head`'s costs at each price) must not decay.
        counted = {name: leaves for name, leaves in params.items() if name != "params"}
        return ({**optax.apply_updates(params, updates), **counted}, opt_state), metrics

    with jax.named_scope("fit"):
        carry, metrics_J = lax.scan(minibatch, (state.params, state.opt_state), (index_JxR, weight_JxR))
    params, opt_state = carry
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics_J


def mean_metrics(fitted_J: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What an update logs of its minibatches."""
    return {f"policy/{name}": jnp.mean(value_J) for name, value_J in fitted_J.items()}


def fit(
    state: TrainState, experience: Experience, index_JxR: jax.Array, weight_JxR: jax.Array, setup: Setup
) -> tuple[TrainState, dict[str, jax.Array]]:
    """GRPO's pass over the minibatches: `descend` on `grpo_loss`."""
    loss = grpo_loss(state.reference, setup)
    return descend(state, loss, experience, index_JxR, weight_JxR, setup.optim)


def grpo_loss(reference: Any, setup: Setup) -> Loss:
    """The clipped loss of a minibatch of `Experience`; `reference` is the frozen policy, or None."""
    cfg = setup.grpo

    def logits(params: Any, batch: Experience) -> jax.Array:
        logits_RxTxA: Any = jax.vmap(functools.partial(setup.network.apply, params))(batch.observation)
        return logits_RxTxA.reshape(-1, logits_RxTxA.shape[-1]) / cfg.temperature

    def loss(params: Any, batch: Experience, weight_R: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        steps = (x.reshape(-1, *x.shape[2:]) for x in (batch.action, batch.logp, batch.advantage))
        weight_N = jnp.repeat(weight_R, batch.action.shape[1])
        return grpo.clipped_loss(
            logits(params, batch),
            *steps,
            clip=cfg.clip,
            entropy_coef=cfg.entropy_coef,
            reference_logits_NxA=logits(reference, batch) if cfg.reference_kl_coef else None,
            reference_kl_coef=cfg.reference_kl_coef,
            weight_N=weight_N,
            cost_AxX=jnp.asarray(setup.space.costs_AxX),
            price_NxX=None if batch.price is None else batch.price.reshape(len(weight_N), -1),
            axis_sizes=setup.space.level_counts if cfg.credit == "axis" else (),
        )

    return loss
