"""Generation as pure functions: a dense prefill, then episodes of T steps that write their own tokens.

A `Row` is one text between episodes: the cache of all its tokens but the last, which is drawn and not yet
consumed.  `start` makes rows of prompts; `play` runs one episode: the controller picks each step's action
(its state starts anew), each token is drawn from the compressed step's logits, and at the end

  - the entries written under compression are replaced by dense ones (*KV refresh*), or
  - stay as they are (`refresh=False`), or
  - the dense pass also checks the tokens, and those that the dense model would not have drawn are taken back
    (`lossless`, see `speculate`).

The maths is one row's.  Rows of a batch share nothing but the time they take: what comes of a row depends
neither on the others nor on padding.  Source: sol.md section 8.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import current_platform
from sol_jax.axes.base import ActionSpace
from sol_jax.generation.lossless import accept
from sol_jax.generation.sampling import GREEDY, Sampling, draw, token_logp
from sol_jax.models import llama
from sol_jax.models.llama import KVCache, LlamaConfig, Suffix, Weights
from sol_jax.rl.policy import Policy, PolicyConfig
from sol_jax.rl.rollout import (
    Carry,
    Controller,
    begin,
    controlled_step,
    label_logp,
    policy_controller,
    replay,
)

HEAD_ROWS = 256  # hidden states whose vocabulary logits exist at a time when a text is scored


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Everything static about generation; hashable, a static argument of the jitted functions."""

    model: LlamaConfig
    space: ActionSpace
    horizon: int = 16  # T
    uncontrolled: int = 7  # steps with at most this many keys take the dense action
    policy: PolicyConfig | None = None  # None: schedules are replayed
    sampling: Sampling = GREEDY
    refresh: bool = True
    lossless: bool = False
    prefill_batch: int = 1  # prompts prefilled at a time, see `usual_prefill_batch`

    def __post_init__(self):
        if self.policy and self.horizon > self.policy.horizon:
            raise ValueError(
                f"the horizon is {self.horizon}, but the policy has positions for {self.policy.horizon} steps"
            )
        if self.lossless and not self.refresh:
            raise ValueError("lossless generation is checked by the refresh pass, so refresh cannot be off")


def usual_prefill_batch() -> int:
    """Prompts to prefill at a time: one suits a CPU's caches, more fill an accelerator."""
    return 1 if current_platform() == "cpu" else 32


class Row(NamedTuple):
    """One text between two episodes."""

    cache: KVCache  # [L, Hkv, capacity, d]
    length: jax.Array  # entries of it that are filled
    hidden_D: jax.Array  # final-norm hidden state of the last of them
    token: jax.Array  # the next one: drawn, not yet consumed
    key: jax.Array  # of the text; what is drawn at a position depends on this and the position alone


class Keys(NamedTuple):
    """Random keys of one position of a text."""

    draw: jax.Array
    act: jax.Array
    accept: jax.Array
    replace: jax.Array


def keys_at(key: jax.Array, position: jax.Array) -> Keys:
    """The keys of the token at `position`, whoever draws it: any batch, any horizon."""
    return Keys(*jax.random.split(jax.random.fold_in(key, position), 4))


class Steps(NamedTuple):
    """What the T steps of an episode did."""

    token_T: jax.Array  # drawn after each step
    action_T: jax.Array  # taken
    controllable_T: jax.Array  # False where that was the dense action, whatever the controller chose
    logp_TxV: jax.Array  # the distributions that the tokens were drawn from
    seen_TxD: jax.Array  # the hidden state that each step's controller saw


class Played(NamedTuple):
    """One episode as the host sees it: the first `num_new` of `token_N` are new, N is T (lossless: T + 1)."""

    token_N: jax.Array
    num_new: jax.Array
    action_T: jax.Array
    controllable_T: jax.Array
    seen_TxD: jax.Array


def prefill_prompt(
    weights: Weights, tokens_S: jax.Array, length: jax.Array, capacity: int, cfg: LlamaConfig
) -> tuple[jax.Array, KVCache]:
    """A dense pass over the first `length` tokens: the last one's final-norm hidden state and the cache.

    The cache has room for `capacity` entries.  Of no tokens the hidden state is 0.
    """
    hidden_SxD, cache = llama.prefill(weights, tokens_S, cfg)
    room = ((0, 0), (0, 0), (0, capacity - tokens_S.shape[0]), (0, 0))
    hidden_D = jnp.where(length > 0, hidden_SxD[length - 1], 0.0)
    return hidden_D, KVCache(*(jnp.pad(part, room) for part in cache))


@functools.partial(jax.jit, static_argnames=("capacity", "cfg"))
def start(
    weights: Weights,
    tokens_BxS: jax.Array,
    length_B: jax.Array,
    key_B: jax.Array,
    capacity: int,
    cfg: Decoder,
) -> Row:
    """Rows of prompts, the first `length` tokens of each line, with room for `capacity` entries."""

    def one(tokens_S: jax.Array, length: jax.Array, key: jax.Array) -> Row:
        hidden_D, cache = prefill_prompt(weights, tokens_S, length, capacity, cfg.model)
        logp_V = token_logp(llama.logits(weights, hidden_D), cfg.sampling)
        token = draw(keys_at(key, length).draw, logp_V, cfg.sampling)
        return Row(cache, length, hidden_D, token, key)

    batch = min(cfg.prefill_batch, len(tokens_BxS))
    return lax.map(lambda prompt: one(*prompt), (tokens_BxS, length_B, key_B), batch_size=batch)


def draft(
    weights: Weights, row: Row, budget_X: jax.Array, controller: Controller, cfg: Decoder
) -> tuple[Steps, Suffix, jax.Array]:
    """T steps under `controller`, each consuming the token that the one before drew.

    Returns what they did, the cache entries they wrote and the last hidden state.
    """
    T, space = cfg.horizon, cfg.space
    prefix = llama.make_prefix(row.cache, row.length, space.axes)

    def step(carry: tuple[Carry, jax.Array], t: jax.Array) -> tuple[tuple[Carry, jax.Array], Steps]:
        state, token = carry
        keys, seen_D = keys_at(row.key, row.length + t + 1), state.hidden_D
        state, did = controlled_step(
            weights,
            prefix,
            state,
            t,
            token,
            keys.act,
            budget_X,
            controller.act,
            space,
            cfg.model,
            cfg.uncontrolled,
            T,
        )
        with jax.named_scope("head"):
            logp_V = token_logp(llama.logits(weights, state.hidden_D), cfg.sampling)
            token = draw(keys.draw, logp_V, cfg.sampling)
        action = jnp.where(did.controllable_T, did.action_T, space.dense)
        return (state, token), Steps(token, action, did.controllable_T, logp_V, seen_D)

    start = begin(prefix, row.hidden_D, controller, T, space), row.token
    (state, _), steps = lax.scan(step, start, jnp.arange(T))
    return steps, state.suffix, state.hidden_D


def keep_all(
    weights: Weights, row: Row, steps: Steps, suffix: Suffix, hidden_D: jax.Array, cfg: Decoder
) -> tuple[Row, Played]:
    """The row once all T tokens stay: with dense cache entries, or with the compressed ones."""
    entries = suffix.cache
    if cfg.refresh:
        consumed_T = jnp.concatenate([row.token[None], steps.token_T[:-1]])
        with jax.named_scope("refresh"):
            dense_TxD, entries = llama.extend(weights, consumed_T, row.cache, row.length, cfg.model)
        hidden_D = dense_TxD[-1]
    cache = llama.append(row.cache, entries, row.length)
    after = Row(cache, row.length + cfg.horizon, hidden_D, steps.token_T[-1], row.key)
    return after, Played(
        steps.token_T, jnp.int32(cfg.horizon), steps.action_T, steps.controllable_T, steps.seen_TxD
    )


def keep_agreed(weights: Weights, row: Row, steps: Steps, cfg: Decoder) -> tuple[Row, Played]:
    """The row once the dense model has checked the T tokens: those it accepts stay, and one of its own."""
    T = cfg.horizon
    consumed_N = jnp.concatenate([row.token[None], steps.token_T])
    with jax.named_scope("refresh"):
        dense_NxD, entries = llama.extend(weights, consumed_N, row.cache, row.length, cfg.model)
        dense_NxV = llama.logits(weights, dense_NxD)
        dense_NxV = jax.vmap(lambda logits_V: token_logp(logits_V, cfg.sampling))(dense_NxV)
    keys_N = jax.vmap(lambda t: keys_at(row.key, row.length + t + 1))(jnp.arange(T + 1))
    agreed, token = accept(
        keys_N.accept, keys_N.replace, steps.token_T, steps.logp_TxV, dense_NxV, cfg.sampling
    )
    cache = llama.append(row.cache, entries, row.length)  # those of refused tokens lie beyond the new length
    after = Row(cache, row.length + agreed + 1, dense_NxD[agreed], token, row.key)
    token_N = jnp.append(steps.token_T, 0).at[agreed].set(token)
    return after, Played(token_N, agreed + 1, steps.action_T, steps.controllable_T, steps.seen_TxD)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="row_B")
def play(
    weights: Weights, params: Any, row_B: Row, budget_BxX: jax.Array, plan_BxT: jax.Array, cfg: Decoder
) -> tuple[Row, Played]:
    """One episode of every row: under the greedy policy, or replaying `plan` if `params` is None."""

    def one(row: Row, budget_X: jax.Array, plan_T: jax.Array) -> tuple[Row, Played]:
        controller = replay(plan_T)
        if cfg.policy is not None:
            controller = policy_controller(Policy(cfg.policy), params, temperature=1.0, greedy=True)
        steps, suffix, hidden_D = draft(weights, row, budget_X, controller, cfg)
        if cfg.lossless:
            return keep_agreed(weights, row, steps, cfg)
        return keep_all(weights, row, steps, suffix, hidden_D, cfg)

    return jax.vmap(one)(row_B, budget_BxX, plan_BxT)


@functools.partial(jax.jit, static_argnames="cfg")
def text_hidden(weights: Weights, tokens_N: jax.Array, cfg: LlamaConfig) -> jax.Array:
    """The dense model's final-norm hidden state after each token, [N, D]."""
    return llama.prefill(weights, tokens_N, cfg)[0]


@functools.partial(jax.jit, static_argnames="cfg")
def text_logp(weights: Weights, tokens_N: jax.Array, cfg: LlamaConfig) -> jax.Array:
    """The dense model's log-probability of each token but the first, [N - 1]."""
    hidden_NxD, _ = llama.prefill(weights, tokens_N[:-1], cfg)
    rows = min(HEAD_ROWS, len(tokens_N) - 1)
    return lax.map(lambda x: label_logp(weights, *x), (hidden_NxD, tokens_N[1:]), batch_size=rows)
