"""One episode under one controller: a scan over T teacher-forced decode steps of one schedule.

Everything is written for one schedule of one sequence.  `group_rollout` vmaps it over the K schedules
of an episode, with the prefix unbatched; callers vmap that over sequences.

Source: sol.md section 3; arXiv 2605.10875 section 3.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sol_jax.axes.base import ActionSpace
from sol_jax.models import llama
from sol_jax.models.llama import LlamaConfig, Prefix, Suffix, Weights
from sol_jax.rl.grpo import action_logp
from sol_jax.rl.policy import Observation, Policy, PolicyCarry, initial_carry, observation_scalars


@dataclasses.dataclass(frozen=True)
class EpisodeConfig:
    """The shape of an episode and of the block of text it is cut from."""

    prefix_len: int  # S, tokens prefilled densely before the first episode of a block
    horizon: int  # T, decode steps of an episode
    episodes_per_prefix: int = 1  # W, episodes of one block, `horizon` tokens apart
    uncontrolled: int = 7  # steps with at most this many keys take the dense action (sinks + window + 1)
    # In training, tokens by which the episodes of a block start earlier at most, drawn for each block.  It is
    # not in the repr, by which stored scores know the shape they are of.
    jitter: int = dataclasses.field(default=0, repr=False)

    @property
    def block_length(self) -> int:
        """Tokens of a block: every episode's tokens and the last label."""
        return self.prefix_len + self.episodes_per_prefix * self.horizon + 1


class Episode(NamedTuple):
    """What the K schedules of one episode share."""

    prefix: Prefix
    hidden_D: jax.Array  # final-norm hidden state of the prefix' last token
    token_T: jax.Array  # consumed by the steps
    label_T: jax.Array  # to be predicted by them


class Controller(NamedTuple):
    """Who picks the actions: `act(key, observation, memory) -> (action, log-probability, memory)`."""

    act: Callable[[jax.Array, Observation, Any], tuple[jax.Array, jax.Array, Any]]
    memory: Any  # before the first step


class Rollout(NamedTuple):
    """What happened in one schedule; `observation` is what the controller saw, [T, ...] each."""

    observation: Observation
    action_T: jax.Array  # chosen by the controller
    logp_T: jax.Array  # of that action, under the controller
    cost_TxX: jax.Array  # of the action taken
    controllable_T: jax.Array  # False where the dense action was taken instead
    hidden_TxD: jax.Array  # final-norm hidden state after each step


def replay(action_T: jax.Array) -> Controller:
    """A controller that plays a given schedule."""

    def act(key: jax.Array, seen: Observation, coming_T: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return coming_T[0], jnp.float32(0.0), jnp.roll(coming_T, -1)

    return Controller(act, jnp.asarray(action_T, jnp.int32))


def policy_controller(policy: Policy, params: Any, temperature: float, greedy: bool = False) -> Controller:
    """The policy as a controller: samples at `temperature`, or takes the most likely action."""

    def act(
        key: jax.Array, seen: Observation, carry: PolicyCarry
    ) -> tuple[jax.Array, jax.Array, PolicyCarry]:
        scored: Any = policy.apply(params, seen, carry, method="step")
        logits_A, carry = scored[0] / temperature, scored[1]
        action = jnp.argmax(logits_A) if greedy else jax.random.categorical(key, logits_A)
        return action.astype(jnp.int32), action_logp(logits_A, action), carry

    return Controller(act, initial_carry(policy.config))


def cut_episodes(
    weights: Weights,
    tokens_N: jax.Array,
    space: ActionSpace,
    cfg: LlamaConfig,
    shape: EpisodeConfig,
    with_reference: bool = False,
    early: jax.Array | int = 0,
) -> tuple[Episode, jax.Array | None]:
    """The W episodes of one block of `shape.block_length` tokens, all from a single dense prefill.

    They start `early` tokens before the prefix' end, so that they begin anywhere in a page.

    Returns the episodes, with a leading W where `EPISODE_AXES` says 0 (the cache is one, and each episode
    sees its own past only), and, `with_reference`, the dense model's hidden states at the decoded
    positions [W, T, D], for which the same prefill runs on to the end of the block.
    """
    S, T, W = shape.prefix_len, shape.horizon, shape.episodes_per_prefix
    start_W = S + T * np.arange(W) - early
    step_WxT = start_W[:, None] + np.arange(T)
    prefilled = S + T * (W - 1) + (T if with_reference else 0)
    hidden_MxD, cache = llama.prefill(weights, tokens_N[:prefilled], cfg)
    prefix = llama.make_prefix(cache, jnp.asarray(start_W, jnp.int32), space.axes)
    episode_W = Episode(prefix, hidden_MxD[start_W - 1], tokens_N[step_WxT], tokens_N[step_WxT + 1])
    return episode_W, hidden_MxD[step_WxT] if with_reference else None


# What of an episode has a leading W: everything but the shared cache and its index.  These are vmap's axes
# in place of the arrays, hence the ignored types.
EPISODE_AXES = Episode(Prefix(cache=None, axis_index=None, length=0), 0, 0, 0)  # type: ignore[arg-type]


class Carry(NamedTuple):
    """What one controlled step hands to the next of its episode."""

    suffix: Suffix
    memory: Any  # of the controller
    hidden_D: jax.Array
    prev_action: jax.Array
    cost_sum_X: jax.Array  # over the steps that count
    counted: jax.Array


def begin(
    prefix: Prefix, hidden_D: jax.Array, controller: Controller, steps: int, space: ActionSpace
) -> Carry:
    """Before the first of `steps` steps; `hidden_D` is that of the prefix' last token."""
    suffix = llama.empty_suffix(prefix, steps, space.axes)
    no_action, no_cost_X = jnp.int32(space.num_actions), jnp.zeros(len(space.axes))
    return Carry(suffix, controller.memory, hidden_D, no_action, no_cost_X, jnp.int32(0))


def controlled_step(
    weights: Weights,
    prefix: Prefix,
    carry: Carry,
    t: jax.Array,
    token: jax.Array,
    key: jax.Array,
    budget_X: jax.Array,
    act: Callable[[jax.Array, Observation, Any], tuple[jax.Array, jax.Array, Any]],
    space: ActionSpace,
    cfg: LlamaConfig,
    uncontrolled: int,
    horizon: int,
) -> tuple[Carry, Rollout]:
    """Step `t` of an episode of `horizon`, as `rollout` says; what it did is without the T of `Rollout`."""
    num_keys = jnp.int32(prefix.length + t + 1)
    controllable = num_keys > uncontrolled
    scalars = observation_scalars(t, horizon, controllable, budget_X, carry.cost_sum_X, carry.counted)
    seen = Observation(carry.hidden_D, llama.embed(weights, token), scalars, carry.prev_action, num_keys)
    with jax.named_scope("controller"):
        chosen, logp, memory = act(key, seen, carry.memory)
        action = jnp.where(controllable, chosen, space.dense)
    with jax.named_scope("llama"):
        value_X = jnp.asarray(space.values_AxX)[action]
        hidden_D, suffix = llama.decode_step(
            weights, prefix, carry.suffix, token, t, value_X, space.axes, cfg
        )
    cost_X = jnp.asarray(space.costs_AxX)[action]
    cost_sum_X, counted = carry.cost_sum_X + controllable * cost_X, carry.counted + controllable
    # The controller's own choice is what it is trained on and told of, as in the authors' code.
    after = Carry(suffix, memory, hidden_D, chosen, cost_sum_X, counted)
    return after, Rollout(seen, chosen, logp, cost_X, controllable, hidden_D)


def rollout(
    weights: Weights,
    episode: Episode,
    key: jax.Array,
    budget_X: jax.Array,
    controller: Controller,
    space: ActionSpace,
    cfg: LlamaConfig,
    uncontrolled: int,
    horizon: int | None = None,
) -> Rollout:
    """One schedule of one episode under `controller`, asked for the mean costs `budget_X`.

    Steps with at most `uncontrolled` keys take the dense action, whatever the controller chose, and do not
    count towards the costs that it sees.  An episode of `horizon` steps can end early, with its tokens.
    """
    T = episode.token_T.shape[0]

    def step(carry: Carry, inputs: tuple) -> tuple[Carry, Rollout]:
        t, token, key = inputs
        return controlled_step(
            weights,
            episode.prefix,
            carry,
            t,
            token,
            key,
            budget_X,
            controller.act,
            space,
            cfg,
            uncontrolled,
            horizon or T,
        )

    start = begin(episode.prefix, episode.hidden_D, controller, T, space)
    return lax.scan(step, start, (jnp.arange(T), episode.token_T, jax.random.split(key, T)))[1]


def group_rollout(
    weights: Weights,
    episode: Episode,
    key_K: jax.Array,
    budget_KxX: jax.Array,
    controller_K: Controller,
    space: ActionSpace,
    cfg: LlamaConfig,
    uncontrolled: int,
) -> Rollout:
    """K schedules of one episode: `rollout` vmapped over keys, budgets and memories; one prefix for all."""

    def one(key: jax.Array, budget_X: jax.Array, memory: Any) -> Rollout:
        controller = Controller(controller_K.act, memory)
        return rollout(weights, episode, key, budget_X, controller, space, cfg, uncontrolled)

    return jax.vmap(one)(key_K, budget_KxX, controller_K.memory)


def label_logp(weights: Weights, hidden_D: jax.Array, label: jax.Array) -> jax.Array:
    """Log-probability of the next token under one hidden state."""
    logits_V = llama.logits(weights, hidden_D)
    return logits_V[label] - jax.nn.logsumexp(logits_V)


def dense_divergence(weights: Weights, dense_D: jax.Array, hidden_D: jax.Array) -> jax.Array:
    """KL(p_dense || p_sparse) between the next-token distributions of two hidden states."""
    dense_V, sparse_V = (jax.nn.log_softmax(llama.logits(weights, h)) for h in (dense_D, hidden_D))
    return jnp.sum(jnp.exp(dense_V) * (dense_V - sparse_V))


def acceptance_logp(weights: Weights, dense_D: jax.Array, hidden_D: jax.Array) -> jax.Array:
    """Log of the chance that the dense model keeps a token drawn from the compressed step.

    That is the sum of min(p_dense, p_sparse) under the rule of `speculate`, at temperature 1.
    """
    dense_V, sparse_V = (jax.nn.log_softmax(llama.logits(weights, h)) for h in (dense_D, hidden_D))
    return jax.nn.logsumexp(jnp.minimum(dense_V, sparse_V))
