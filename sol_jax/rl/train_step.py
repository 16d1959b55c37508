"""One GRPO update as a pure function: blocks of text in, a better policy and metrics out.

`train_step` is the whole of it (prefill, rollout, rewards, advantages, minibatches) and is jitted once,
with the state donated.  Its stages `collect`, `advantages` and `fit` stand alone for tests and benchmarks.

Source: sol.md sections 3 and 5; arXiv 2605.10875 sections 3.3 and 4.  `J` counts minibatches, `R` the
schedules of a minibatch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sol_jax.axes.base import ActionSpace
from sol_jax.models.llama import LlamaConfig, Weights
from sol_jax.rl import grpo, rewards
from sol_jax.rl.policy import Observation, Policy, PolicyConfig, example_observation, initial_carry
from sol_jax.rl.rollout import (
    EPISODE_AXES,
    Controller,
    Episode,
    EpisodeConfig,
    Rollout,
    acceptance_logp,
    cut_episodes,
    dense_divergence,
    group_rollout,
    label_logp,
    policy_controller,
)


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """What is learned from; the paper's symbol behind each field (defaults: appendix B)."""

    num_schedules: int = 16  # K
    gamma: float = 0.85  # discount of the return
    returns: Literal["sum", "max", "none"] = "sum"
    level: Literal["process", "outcome"] = "process"
    norm: Literal["center", "zscore"] = "center"
    whiten: bool = True
    temperature: float = 1.3  # of the policy in rollouts and in the loss
    clip: float = 0.2  # epsilon
    entropy_coef: float = 0.05
    dead_zone: float = 0.02  # budget misses up to this cost nothing
    # How the penalty is learned from: as part of the return of what was sampled, or (not the paper's) through
    # the expected cost of each step under the policy, which leaves returns to likelihood alone.
    penalty_gradient: Literal["sampled", "expected"] = "sampled"
    # The most that a unit of expected cost may be worth, in standard deviations of the advantages.
    max_price: float = 2.0
    quality_weight: float = 1.0  # of the returns, beside the penalties; 0 rewards budgets alone
    # What a step is rewarded for: the label's log-probability, or (not the paper's) the log of the chance
    # that the dense model would keep a token drawn from it, for lossless generation.
    reward: Literal["likelihood", "acceptance"] = "likelihood"
    divergence_weight: float = 0.0  # w: share of KL(dense || sparse) in the reward
    reference_kl_coef: float = 0.0  # beta: pull towards the policy the run started from

    @property
    def needs_dense(self) -> bool:
        """Whether rewards compare each step with the dense model."""
        return self.divergence_weight > 0 or self.reward == "acceptance"


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and how a batch is cut for it."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    clip_norm: float = 2.0
    warmup: int = 0  # optimizer steps
    decay_steps: int = 0  # cosine decay to 0 over this many optimizer steps; 0 keeps the rate constant
    minibatch_steps: int = 512  # decode steps of a minibatch; whole schedules, at least one
    accumulate: int = 8  # minibatches of one optimizer step


@dataclasses.dataclass(frozen=True)
class Memory:
    """How much runs at once; changes memory and speed, never results beyond rounding."""

    prefill_batch: int = 1  # blocks prefilled at a time: 1 keeps a CPU's caches warm, more fill a GPU
    head_rows: int = 256  # hidden states whose logits over the vocabulary exist at a time


@dataclasses.dataclass(frozen=True)
class Setup:
    """All static choices of a run; hashable, so it is a static argument of jitted functions."""

    model: LlamaConfig
    space: ActionSpace
    episode: EpisodeConfig
    policy: PolicyConfig
    grpo: GrpoConfig = GrpoConfig()
    optim: OptimConfig = OptimConfig()
    memory: Memory = Memory()

    @functools.cached_property
    def network(self) -> Policy:
        return Policy(self.policy)


class TrainState(NamedTuple):
    """Everything an update changes, and what it needs to be repeated exactly."""

    step: jax.Array  # updates done
    key: jax.Array  # of the run; each update folds its number in
    params: Any
    opt_state: Any
    reference: Any  # the frozen policy of `reference_kl_coef`, or None


class Experience(NamedTuple):
    """A batch of rollouts as the loss needs it; leading axes [B, W, K] until `fit` flattens them."""

    observation: Observation
    action_T: jax.Array
    logp_T: jax.Array
    adv_T: jax.Array
    price_TxX: jax.Array | None = None  # of each axis' expected cost, with `penalty_gradient` "expected"


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


def init_state(key: jax.Array, setup: Setup) -> TrainState:
    """A fresh policy and optimizer."""
    init_key, run_key = jax.random.split(key)
    example = example_observation(setup.policy), initial_carry(setup.policy)
    params = setup.network.init(init_key, *example, method="step")
    reference = jax.tree.map(jnp.copy, params) if setup.grpo.reference_kl_coef else None
    return TrainState(jnp.int32(0), run_key, params, optimizer(setup.optim).init(params), reference)


def draw_budgets(key: jax.Array, shape: tuple[int, ...], space: ActionSpace) -> jax.Array:
    """Requested mean cost per axis, [*shape, X]: uniform in the axis' range, or one of its choices."""

    def draw(key: jax.Array, axis: Any) -> jax.Array:
        if axis.budget_choices:
            return jax.random.choice(key, jnp.array(axis.budget_choices, jnp.float32), shape)
        low, high = axis.budget
        return jax.random.uniform(key, shape, minval=low, maxval=high)

    keys = jax.random.split(key, len(space.axes))
    return jnp.stack([draw(k, axis) for k, axis in zip(keys, space.axes, strict=True)], -1)


def prefill_blocks(
    weights: Weights,
    tokens_BxN: jax.Array,
    setup: Setup,
    with_reference: bool = False,
    early_B: jax.Array | None = None,
) -> tuple[Episode, jax.Array | None]:
    """`cut_episodes` of each block, `memory.prefill_batch` blocks at a time; leading axis B."""
    space, model, shape = setup.space, setup.model, setup.episode

    def cut(block: tuple[jax.Array, jax.Array | int]) -> tuple[Episode, jax.Array | None]:
        tokens_N, early = block
        return cut_episodes(weights, tokens_N, space, model, shape, with_reference, early)

    with jax.named_scope("prefill"):
        batch = min(setup.memory.prefill_batch, len(tokens_BxN))
        if early_B is None:  # starts are constants of the program
            return lax.map(lambda tokens_N: cut((tokens_N, 0)), tokens_BxN, batch_size=batch)
        return lax.map(cut, (tokens_BxN, early_B), batch_size=batch)


def run_schedules(
    weights: Weights,
    episode: Episode,
    key: jax.Array,
    budget_BxWxKxX: jax.Array,
    controller: Controller,
    setup: Setup,
) -> Rollout:
    """K schedules of every episode as one batch: [B, W, K, ...].  `controller.memory` has those axes too."""

    def group(episode: Episode, key_K: jax.Array, budget_KxX: jax.Array, memory_K: Any) -> Rollout:
        each = Controller(controller.act, memory_K)
        uncontrolled = setup.episode.uncontrolled
        return group_rollout(
            weights, episode, key_K, budget_KxX, each, setup.space, setup.model, uncontrolled
        )

    keys = jax.random.split(key, budget_BxWxKxX.shape[:-1])
    with jax.named_scope("rollout"):
        over_windows = jax.vmap(group, in_axes=(EPISODE_AXES, 0, 0, 0))
        return jax.vmap(over_windows)(episode, keys, budget_BxWxKxX, controller.memory)


def score(weights: Weights, rollout: Rollout, label_BxWxT: jax.Array, rows: int) -> jax.Array:
    """Log-probability of every label under every schedule, [B, W, K, T]; `rows` hidden states at a time.

    Done after the scan, so that it is a few large matrix products instead of T small ones.
    """
    hidden = rollout.hidden_TxD
    label_BxWxKxT = jnp.broadcast_to(label_BxWxT[:, :, None], hidden.shape[:-1])
    inputs = hidden.reshape(-1, hidden.shape[-1]), label_BxWxKxT.reshape(-1)
    with jax.named_scope("head"):
        logp_N = lax.map(lambda x: label_logp(weights, *x), inputs, batch_size=min(rows, len(inputs[0])))
    return logp_N.reshape(label_BxWxKxT.shape)


def beside_dense(
    measure: Callable[[Weights, jax.Array, jax.Array], jax.Array],
    weights: Weights,
    rollout: Rollout,
    dense_BxWxTxD: jax.Array,
    rows: int,
) -> jax.Array:
    """`measure(weights, dense_D, hidden_D)` of every step of every schedule, [B, W, K, T]."""
    hidden = rollout.hidden_TxD
    dense = jnp.broadcast_to(dense_BxWxTxD[:, :, None], hidden.shape)
    inputs = dense.reshape(-1, hidden.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    with jax.named_scope("head"):
        measured_N = lax.map(lambda x: measure(weights, *x), inputs, batch_size=min(rows, len(inputs[0])))
    return measured_N.reshape(hidden.shape[:-1])


def collect(
    weights: Weights,
    controller: Controller,
    tokens_BxN: jax.Array,
    key: jax.Array,
    budget_BxWxX: jax.Array,
    setup: Setup,
    early_B: jax.Array | None = None,
) -> tuple[Rollout, jax.Array]:
    """K rollouts of every episode of a batch of blocks, and their rewards: [B, W, K, T, ...]."""
    w, rows = setup.grpo.divergence_weight, setup.memory.head_rows
    episode, dense_BxWxTxD = prefill_blocks(weights, tokens_BxN, setup, setup.grpo.needs_dense, early_B)
    K = setup.grpo.num_schedules
    shape = (*budget_BxWxX.shape[:2], K)
    budget_BxWxKxX = jnp.broadcast_to(budget_BxWxX[:, :, None], (*shape, budget_BxWxX.shape[-1]))
    memory = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape, *leaf.shape)), controller.memory)
    each = Controller(controller.act, memory)
    rollout = run_schedules(weights, episode, key, budget_BxWxKxX, each, setup)
    logp = kl = jnp.zeros(())
    if w < 1:
        if setup.grpo.reward == "acceptance":
            assert dense_BxWxTxD is not None
            logp = beside_dense(acceptance_logp, weights, rollout, dense_BxWxTxD, rows)
        else:
            logp = score(weights, rollout, episode.label_T, rows)
    if w > 0:
        assert dense_BxWxTxD is not None
        kl = beside_dense(dense_divergence, weights, rollout, dense_BxWxTxD, rows)
    return rollout, rewards.task_reward(logp, kl, w)


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
    counted = rollout.controllable_T[..., None].astype(jnp.float32)
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
    return batched(reward_BxWxKxT, rollout.cost_TxX, rollout.controllable_T, budget_BxWxX)


def minibatches(
    key: jax.Array, num_schedules: int, cfg: OptimConfig, horizon: int
) -> tuple[jax.Array, jax.Array]:
    """A random cut of all schedules of a batch into minibatches: indices and weights, [J, R] each.

    The last one may be short; it is filled up with schedules of weight 0.
    """
    R = min(max(1, cfg.minibatch_steps // horizon), num_schedules)
    J = -(-num_schedules // R)
    order = jax.random.permutation(key, num_schedules)
    slots = jnp.arange(J * R).reshape(J, R)
    return order[slots % num_schedules], (slots < num_schedules).astype(jnp.float32)


def fit(
    state: TrainState, experience: Experience, index_JxR: jax.Array, weight_JxR: jax.Array, setup: Setup
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One pass over the minibatches; `experience` has one leading axis, the schedules of the batch."""
    cfg, tx = setup.grpo, optimizer(setup.optim)

    def logits(params: Any, batch: Experience) -> jax.Array:
        logits_RxTxA: Any = jax.vmap(functools.partial(setup.network.apply, params))(batch.observation)
        return logits_RxTxA.reshape(-1, logits_RxTxA.shape[-1]) / cfg.temperature

    def loss(params: Any, batch: Experience, weight_R: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        steps = (x.reshape(-1) for x in (batch.action_T, batch.logp_T, batch.adv_T))
        weight_N = jnp.repeat(weight_R, batch.action_T.shape[1])
        reference = logits(state.reference, batch) if cfg.reference_kl_coef else None
        return grpo.clipped_loss(
            logits(params, batch),
            *steps,
            clip=cfg.clip,
            entropy_coef=cfg.entropy_coef,
            reference_logits_NxA=reference,
            reference_kl_coef=cfg.reference_kl_coef,
            weight_N=weight_N,
            cost_AxX=jnp.asarray(setup.space.costs_AxX),
            price_NxX=None if batch.price_TxX is None else batch.price_TxX.reshape(len(weight_N), -1),
        )

    def minibatch(carry: tuple, picked: tuple) -> tuple[tuple, dict[str, jax.Array]]:
        params, opt_state = carry
        index_R, weight_R = picked
        batch = jax.tree.map(lambda leaf: leaf[index_R], experience)
        grads, metrics = jax.grad(loss, has_aux=True)(params, batch, weight_R)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), metrics

    with jax.named_scope("fit"):
        carry, metrics_J = lax.scan(minibatch, (state.params, state.opt_state), (index_JxR, weight_JxR))
    params, opt_state = carry
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics_J


def train_step(
    state: TrainState, weights: Weights, tokens_BxN: jax.Array, setup: Setup
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update on a batch of blocks; pure, and a function of (state, weights, tokens) alone."""
    B, W = len(tokens_BxN), setup.episode.episodes_per_prefix
    budget_key, rollout_key, order_key = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
    budget_BxWxX = draw_budgets(budget_key, (B, W), setup.space)
    controller = policy_controller(setup.network, state.params, setup.grpo.temperature)
    early_B = None
    if setup.episode.jitter:
        early_B = jax.random.randint(jax.random.fold_in(budget_key, 1), (B,), 0, setup.episode.jitter + 1)
    rollout, reward = collect(weights, controller, tokens_BxN, rollout_key, budget_BxWxX, setup, early_B)
    adv, penalty, mean_cost = advantages(reward, rollout, budget_BxWxX, setup)
    price = prices(reward, rollout, budget_BxWxX, setup)
    experience = Experience(rollout.observation, rollout.action_T, rollout.logp_T, adv, price)
    experience = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), experience)
    order = minibatches(order_key, adv.size // adv.shape[-1], setup.optim, setup.episode.horizon)
    state, fitted_J = fit(state, experience, *order, setup)
    metrics = {f"policy/{name}": jnp.mean(value_J) for name, value_J in fitted_J.items()}
    # Also what shows a parameter that this update made NaN or infinite, before it is saved.
    metrics["policy/param_norm"] = optax.tree.norm(state.params)
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
