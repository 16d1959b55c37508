"""One episode under one controller: a scan over T teacher-forced decode steps of one schedule.

Everything is written for one schedule of one sequence.  `group_rollout` vmaps it over the K schedules
of an episode, with the prefix unbatched; callers vmap that over the W episodes of a block, which share its
cache, and over the B blocks.

Source: docs/method.md, "The episode"; arXiv 2605.10875 section 3.
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
from sol_jax.models.llama import IndexedCache, LlamaConfig, Prefix, Suffix, Weights
from sol_jax.rl.config import EpisodeConfig
from sol_jax.rl.grpo import action_at, action_logp
from sol_jax.rl.policy import Observation, Policy, PolicyCarry, budget_gap, initial_carry, progress

Act = Callable[[jax.Array, Observation, Any], tuple[jax.Array, jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class EpisodeRules:
    """All that is static about an episode: the model, the actions, and how long it is.  Hashable."""

    model: LlamaConfig
    space: ActionSpace
    episode: EpisodeConfig
    # Whether controllers are shown the token's logit.  Else it is 0: on TPUs a column of a head of its own is
    # read by copying the whole head.
    shows_logit: bool = False

    def identity(self) -> dict[str, Any]:
        """All that decides what episodes do, besides weights and controllers, for names of what is stored.

        Explicit, rather than the `repr` of some class: renaming that would orphan what is there.
        """
        return {
            "dtype": self.model.dtype,
            "kernels": self.model.kernels,
            "axes": [axis.identity() for axis in self.space.axes],
            "costs": {axis.name: [axis.cost(x) for x in axis.levels] for axis in self.space.axes},
            "horizon": self.episode.horizon,
            "uncontrolled": self.episode.uncontrolled,
        }


class Episode(NamedTuple):
    """What the schedules of one episode share, besides the cache that it shares with others."""

    length: jax.Array  # entries of the cache that come before it
    hidden: jax.Array  # [D], final-norm hidden state of the last of these tokens
    token: jax.Array  # [T], consumed by the steps
    label: jax.Array  # [T], to be predicted by them


class PrefilledBlock(NamedTuple):
    """A block after its dense prefill."""

    cache: IndexedCache
    episodes: Episode  # leading axis W
    dense_hidden: jax.Array | None = None  # [W, T, D], the dense model's at the decoded positions


class Controller(NamedTuple):
    """Who picks the actions: `act(key, observation, memory) -> (action, log-probability, memory)`."""

    act: Act
    memory: Any  # before the first step


class Rollout(NamedTuple):
    """What happened in one schedule, step by step: every field leads with T, and batches go before it."""

    observation: Observation  # what the controller saw
    action: jax.Array  # chosen by the controller
    logp: jax.Array  # of that action, under the controller
    cost: jax.Array  # [T, X], of the action taken
    controllable: jax.Array  # False where the dense action was taken instead
    hidden: jax.Array  # [T, D], final-norm hidden state after each step


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

    return Controller(act, initial_carry(policy.spec))


def placed_controller(policy: Policy, params: Any, temperature: float, sizes: tuple[int, ...]) -> Controller:
    """The policy as a controller that draws nothing: its memory says at which places of its distributions
    it acts (see `grpo.action_at`).  What comes after the carry in the memory is given, [T, X].
    """

    def act(key: jax.Array, seen: Observation, memory: Any) -> tuple[jax.Array, jax.Array, Any]:
        carry, coming_TxX = memory
        scored: Any = policy.apply(params, seen, carry, method="step")
        logits_A = scored[0] / temperature
        action = action_at(logits_A, coming_TxX[0], sizes)
        return action, action_logp(logits_A, action), (scored[1], jnp.roll(coming_TxX, -1, 0))

    return Controller(act, initial_carry(policy.spec))


def prefill_block(
    weights: Weights,
    tokens_N: jax.Array,
    rules: EpisodeRules,
    with_dense: bool = False,
    early: jax.Array | int = 0,
) -> PrefilledBlock:
    """One dense prefill of a block of `block_length` tokens, and its W episodes, each of which sees its past.

    They start `early` tokens before the prefix' end, so that they begin anywhere in a page.  `with_dense`:
    the prefill runs on to the end of the block, and the hidden states at the decoded positions are kept.
    """
    S, T, W = rules.episode.prefix_len, rules.episode.horizon, rules.episode.episodes_per_prefix
    start_W = S + T * np.arange(W) - early
    step_WxT = start_W[:, None] + np.arange(T)
    prefilled = S + T * (W - 1) + (T if with_dense else 0)
    hidden_MxD, kv = llama.prefill(weights, tokens_N[:prefilled], rules.model)
    cache = llama.index_cache(kv, rules.space.axes)
    episodes = Episode(
        jnp.asarray(start_W, jnp.int32), hidden_MxD[start_W - 1], tokens_N[step_WxT], tokens_N[step_WxT + 1]
    )
    return PrefilledBlock(cache, episodes, hidden_MxD[step_WxT] if with_dense else None)


class Carry(NamedTuple):
    """What one controlled step hands to the next of its episode."""

    suffix: Suffix
    memory: Any  # of the controller
    hidden: jax.Array  # [D]
    prev_action: jax.Array
    cost_sum: jax.Array  # [X], over the steps that count
    counted: jax.Array


class Step(NamedTuple):
    """What a controlled step starts from besides the carry."""

    t: jax.Array  # of the episode, from 0
    token: jax.Array
    key: jax.Array  # of what the controller draws


def begin(
    prefix: Prefix, hidden_D: jax.Array, controller: Controller, num_steps: int, space: ActionSpace
) -> Carry:
    """Before the first of `num_steps` steps; `hidden_D` is that of the prefix' last token."""
    suffix = llama.empty_suffix(prefix, num_steps, space.axes)
    no_action, no_cost_X = jnp.int32(space.num_actions), jnp.zeros(len(space.axes))
    return Carry(suffix, controller.memory, hidden_D, no_action, no_cost_X, jnp.int32(0))


def controlled_step(
    weights: Weights,
    rules: EpisodeRules,
    prefix: Prefix,
    act: Act,
    budget_X: jax.Array,
    carry: Carry,
    step: Step,
) -> tuple[Carry, Rollout]:
    """One step of an episode, as `rollout` says; what it did is a `Rollout` without the T."""
    space, horizon, kernels = rules.space, rules.episode.horizon, rules.model.kernels
    num_keys = jnp.int32(prefix.length + step.t + 1)
    controllable = num_keys > rules.episode.uncontrolled
    seen = Observation(
        hidden=carry.hidden,
        embed=llama.embed(weights, step.token, kernels),
        progress=progress(step.t, horizon),
        controllable=jnp.float32(controllable),
        target=jnp.float32(budget_X),
        gap=budget_gap(carry.cost_sum, carry.counted, budget_X),
        prev_action=carry.prev_action,
        num_keys=num_keys,
        logit=llama.token_logit(weights, carry.hidden, step.token, kernels)
        if rules.shows_logit
        else jnp.float32(0),
    )
    with jax.named_scope("controller"):
        chosen, logp, memory = act(step.key, seen, carry.memory)
        action = jnp.where(controllable, chosen, space.dense)
    with jax.named_scope("llama"):
        value_X = jnp.asarray(space.values_AxX)[action]
        hidden_D, suffix = llama.decode_step(
            weights, prefix, carry.suffix, step.token, step.t, value_X, space.axes, rules.model
        )
    cost_X = jnp.asarray(space.costs_AxX)[action]
    cost_sum_X, counted = carry.cost_sum + controllable * cost_X, carry.counted + controllable
    # The controller's own choice is what it is trained on and told of, as in the authors' code.
    after = Carry(suffix, memory, hidden_D, chosen, cost_sum_X, counted)
    return after, Rollout(seen, chosen, logp, cost_X, controllable, hidden_D)


def rollout(
    weights: Weights,
    rules: EpisodeRules,
    cache: IndexedCache,
    episode: Episode,
    key: jax.Array,
    budget_X: jax.Array,
    controller: Controller,
) -> Rollout:
    """One schedule of one episode under `controller`, asked for the mean costs `budget_X`.

    Steps with at most `uncontrolled` keys take the dense action, whatever the controller chose, and do not
    count towards the costs that it sees.  An episode of `horizon` steps can end early, with its tokens.
    """
    T, prefix = episode.token.shape[0], cache.prefix(episode.length)

    def step(carry: Carry, given: Step) -> tuple[Carry, Rollout]:
        return controlled_step(weights, rules, prefix, controller.act, budget_X, carry, given)

    start = begin(prefix, episode.hidden, controller, T, rules.space)
    return lax.scan(step, start, Step(jnp.arange(T), episode.token, jax.random.split(key, T)))[1]


def group_rollout(
    weights: Weights,
    rules: EpisodeRules,
    cache: IndexedCache,
    episode: Episode,
    key_K: jax.Array,
    budget_KxX: jax.Array,
    controller: Controller,
) -> Rollout:
    """K schedules of one episode: `rollout` vmapped over keys, budgets and the controller's memories.

    The prefix is one for all.
    """

    def one(key: jax.Array, budget_X: jax.Array, memory: Any) -> Rollout:
        return rollout(weights, rules, cache, episode, key, budget_X, Controller(controller.act, memory))

    return jax.vmap(one)(key_K, budget_KxX, controller.memory)


def label_logp(weights: Weights, hidden_D: jax.Array, label: jax.Array) -> jax.Array:
    """Log-probability of the next token under one hidden state; NaN if any logit is no number."""
    logits_V = llama.logits(weights, hidden_D)
    logp = logits_V[label] - jax.nn.logsumexp(logits_V)
    return jnp.where(jnp.all(jnp.isfinite(logits_V)), logp, jnp.nan)


def dense_divergence(weights: Weights, dense_D: jax.Array, hidden_D: jax.Array) -> jax.Array:
    """KL(p_dense || p_sparse) between the next-token distributions of two hidden states."""
    dense_V, sparse_V = (jax.nn.log_softmax(llama.logits(weights, h)) for h in (dense_D, hidden_D))
    return jnp.sum(jnp.exp(dense_V) * (dense_V - sparse_V))


def acceptance_logp(weights: Weights, dense_D: jax.Array, hidden_D: jax.Array) -> jax.Array:
    """Log of the chance that the dense model keeps a token drawn from the compressed step.

    That is the sum of min(p_dense, p_sparse) under the rule of `generation.lossless`, at temperature 1.
    """
    dense_V, sparse_V = (jax.nn.log_softmax(llama.logits(weights, h)) for h in (dense_D, hidden_D))
    return jax.nn.logsumexp(jnp.minimum(dense_V, sparse_V))
