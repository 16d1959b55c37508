"""Generation as pure functions: a dense prefill, then episodes of T steps that write their own tokens.

A `TextState` is one text between episodes: the cache of all its tokens but the last, which is drawn and not
yet consumed.  `start` makes them of prompts; `play` runs one episode: the controller picks each step's action
(its state starts anew), each token is drawn from the compressed step's logits, and at the end

  - the entries written under compression are replaced by dense ones (*KV refresh*), or
  - that is done for several episodes at once (`refresh_every`, by `renew`), or
  - they stay as they are (`refresh=False`), or
  - the dense pass also checks the tokens, and those that the dense model would not have drawn are taken back
    (`lossless`, see the module of that name).

The maths is one text's.  Rows of a batch share nothing but the time they take: what comes of a text depends
neither on the others nor on padding.  Source: docs/method.md, "Generation".
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import current_platform
from sol_jax.axes.base import ActionSpace
from sol_jax.generation.lean_policy import by_kernels
from sol_jax.generation.lossless import accept
from sol_jax.generation.sampling import GREEDY, NO_TOKEN, Sampling, draw, finite, token_logp
from sol_jax.models import llama
from sol_jax.models.llama import KVCache, LlamaConfig, Suffix, Weights
from sol_jax.models.sharding import jit_by_row
from sol_jax.rl.policy import Policy, PolicySpec
from sol_jax.rl.rollout import (
    Carry,
    Controller,
    EpisodeRules,
    Step,
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

    rules: EpisodeRules
    policy: PolicySpec | None = None  # None: schedules are replayed
    sampling: Sampling = GREEDY
    refresh: bool = True
    lossless: bool = False
    refresh_every: int = 1  # episodes
    prefill_batch: int = 1  # prompts prefilled at a time, see `usual_prefill_batch`

    @property
    def model(self) -> LlamaConfig:
        return self.rules.model

    @property
    def space(self) -> ActionSpace:
        return self.rules.space

    @property
    def horizon(self) -> int:
        """T, the steps of an episode."""
        return self.rules.episode.horizon

    def identity(self) -> dict[str, Any]:
        """All that decides what is written or scored, besides weights, for names of what is stored."""
        asked = self.policy and self.policy.config.restate
        modes: dict[str, Any] = {"refresh": self.refresh, "lossless": self.lossless, "restate": asked}
        if self.refresh and self.refresh_every != 1:  # else left out: texts of before go by the same name
            modes["refresh_every"] = self.refresh_every
        return self.rules.identity() | modes | {"sampling": dataclasses.asdict(self.sampling)}

    def with_rules(self, **fields: Any) -> Self:
        """A copy with some of the rules replaced: `model`, `space`, `episode`."""
        return dataclasses.replace(self, rules=dataclasses.replace(self.rules, **fields))

    def __post_init__(self):
        if self.policy and self.horizon > self.policy.horizon:
            raise ValueError(
                f"the horizon is {self.horizon}, but the policy has positions for {self.policy.horizon} steps"
            )
        if self.policy and self.policy.config.logit_input and not self.rules.shows_logit:
            raise ValueError("the policy looks at the token's logit, and the rules do not show it")
        if self.lossless and not self.refresh:
            raise ValueError("lossless generation is checked by the refresh pass, so refresh cannot be off")
        if self.refresh_every < 1:
            raise ValueError(f"refresh_every is {self.refresh_every}; it must be at least 1 episode")
        if self.lossless and self.refresh_every != 1:
            raise ValueError("lossless generation refreshes after every episode, so refresh_every must be 1")


def usual_prefill_batch() -> int:
    """Prompts to prefill at a time: one suits a CPU's caches, more fill an accelerator."""
    return 1 if current_platform() == "cpu" else 32


class TextState(NamedTuple):
    """One text between two episodes."""

    cache: KVCache  # [L, Hkv, capacity, d]
    axis_index: tuple[Any, ...]  # what each axis keeps about its keys
    length: jax.Array  # entries of it that are filled
    hidden: jax.Array  # [D], final-norm hidden state of the last of them
    token: jax.Array  # the next one: drawn, not yet consumed
    key: jax.Array  # of the text; what is drawn at a position depends on this and the position alone


class RandomKeys(NamedTuple):
    """Random keys of one position of a text."""

    draw: jax.Array
    act: jax.Array
    accept: jax.Array
    replace: jax.Array


def keys_at(key: jax.Array, position: jax.Array) -> RandomKeys:
    """The keys of the token at `position`, whoever draws it: any batch, any horizon."""
    return RandomKeys(*jax.random.split(jax.random.fold_in(key, position), 4))


class Steps(NamedTuple):
    """What the T steps of an episode did."""

    token: jax.Array  # [T], drawn after each step
    action: jax.Array  # [T], taken
    controllable: jax.Array  # [T], False where that was the dense action, whatever the controller chose
    logp: jax.Array  # [T, V], the distributions that the tokens were drawn from
    seen: jax.Array  # [T, D], the hidden state that each step's controller saw


class Played(NamedTuple):
    """One episode as the host sees it: the first `num_new` of N tokens are new; N is T (lossless: T + 1)."""

    token: jax.Array  # [N]
    num_new: jax.Array
    action: jax.Array  # [T]
    controllable: jax.Array  # [T]
    seen: jax.Array  # [T, D]


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


@jit_by_row(whole=1, static=("capacity", "cfg"))
def start(
    weights: Weights,
    tokens_BxS: jax.Array,
    length_B: jax.Array,
    key_B: jax.Array,
    capacity: int,
    cfg: Decoder,
) -> TextState:
    """Rows of prompts, the first `length` tokens of each line, with room for `capacity` entries."""

    def one(tokens_S: jax.Array, length: jax.Array, key: jax.Array) -> TextState:
        hidden_D, cache = prefill_prompt(weights, tokens_S, length, capacity, cfg.model)
        logits_V = llama.logits(weights, hidden_D, cfg.model.kernels)
        logp_V = token_logp(logits_V, cfg.sampling)
        token = finite(draw(keys_at(key, length).draw, logp_V, cfg.sampling), logits_V)
        indexed = llama.index_cache(cache, cfg.space.axes)
        return TextState(*indexed, length, hidden_D, token, key)

    batch = min(cfg.prefill_batch, len(tokens_BxS))
    return lax.map(lambda prompt: one(*prompt), (tokens_BxS, length_B, key_B), batch_size=batch)


def draft(
    weights: Weights, text: TextState, budget_X: jax.Array, controller: Controller, cfg: Decoder
) -> tuple[Steps, Suffix, jax.Array]:
    """T steps under `controller`, each consuming the token that the one before drew.

    Returns what they did, the cache entries they wrote and the last hidden state.
    """
    T, space = cfg.horizon, cfg.space
    prefix = llama.IndexedCache(text.cache, text.axis_index).prefix(text.length)

    def step(carry: tuple[Carry, jax.Array], t: jax.Array) -> tuple[tuple[Carry, jax.Array], Steps]:
        state, token = carry
        keys, seen_D = keys_at(text.key, text.length + t + 1), state.hidden
        given = Step(t, token, keys.act)
        state, did = controlled_step(weights, cfg.rules, prefix, controller.act, budget_X, state, given)
        with jax.named_scope("head"):
            logits_V = llama.logits(weights, state.hidden, cfg.model.kernels)
            logp_V = token_logp(logits_V, cfg.sampling)
            token = finite(draw(keys.draw, logp_V, cfg.sampling), logits_V, did.logp)
        action = jnp.where(did.controllable, did.action, space.dense)
        return (state, token), Steps(token, action, did.controllable, logp_V, seen_D)

    start = begin(prefix, text.hidden, controller, T, space), text.token
    (state, _), steps = lax.scan(step, start, jnp.arange(T))
    return steps, state.suffix, state.hidden


def keep_all(
    weights: Weights, text: TextState, steps: Steps, suffix: Suffix, hidden_D: jax.Array, cfg: Decoder
) -> tuple[TextState, Played]:
    """The text once all T tokens stay: with dense cache entries, or with the compressed ones."""
    entries = suffix.cache
    if cfg.refresh and cfg.refresh_every == 1:
        consumed_T = jnp.concatenate([text.token[None], steps.token[:-1]])
        with jax.named_scope("refresh"):
            dense_TxD, entries = llama.extend(weights, consumed_T, text.cache, text.length, cfg.model)
        hidden_D = dense_TxD[-1]
    text = _with_entries(text, entries, text.length, cfg)
    after = text._replace(length=text.length + cfg.horizon, hidden=hidden_D, token=steps.token[-1])
    return after, Played(steps.token, jnp.int32(cfg.horizon), steps.action, steps.controllable, steps.seen)


def _with_entries(text: TextState, entries: KVCache, start: jax.Array, cfg: Decoder) -> TextState:
    """The text with `entries` [L, Hkv, N, d] of its tokens from `start` on, of which the axes are told."""
    cache = llama.append(text.cache, entries, start, cfg.model.kernels)
    axes, count = cfg.space.axes, entries.k.shape[2]
    return text._replace(
        cache=cache, axis_index=llama.update_index(text.axis_index, cache, start, count, axes)
    )


@jit_by_row(whole=1, static=("cfg",), donate=(1,))
def renew(weights: Weights, text_B: TextState, consumed_BxN: jax.Array, cfg: Decoder) -> TextState:
    """Texts with dense entries in place of those of the last N tokens that they consumed."""

    def one(text: TextState, consumed_N: jax.Array) -> TextState:
        start = text.length - len(consumed_N)
        with jax.named_scope("refresh"):
            dense_NxD, entries = llama.extend(weights, consumed_N, text.cache, start, cfg.model)
        return _with_entries(text, entries, start, cfg)._replace(hidden=dense_NxD[-1])

    return jax.vmap(one)(text_B, consumed_BxN)


def keep_agreed(weights: Weights, text: TextState, steps: Steps, cfg: Decoder) -> tuple[TextState, Played]:
    """The text once the dense model has checked the T tokens: those it accepts stay, and one of its own."""
    T = cfg.horizon
    consumed_N = jnp.concatenate([text.token[None], steps.token])
    with jax.named_scope("refresh"):
        dense_NxD, entries = llama.extend(weights, consumed_N, text.cache, text.length, cfg.model)
        logits_NxV = llama.logits(weights, dense_NxD)
        dense_NxV = jax.vmap(lambda logits_V: token_logp(logits_V, cfg.sampling))(logits_NxV)
    keys_N = jax.vmap(lambda t: keys_at(text.key, text.length + t + 1))(jnp.arange(T + 1))
    agreed, token = accept(keys_N.accept, keys_N.replace, steps.token, steps.logp, dense_NxV, cfg.sampling)
    # What decided: the dense logits so far, and the drafts up to the one that was not kept.
    so_far_N, drafts_N = jnp.arange(T + 1) <= agreed, jnp.append(steps.token, 0)
    token = finite(token, jnp.where(so_far_N[:, None], logits_NxV, 0.0))
    token = jnp.where(jnp.any(so_far_N & (drafts_N == NO_TOKEN)), NO_TOKEN, token)
    # The entries of refused tokens lie beyond the new length.
    text = _with_entries(text, entries, text.length, cfg)
    after = text._replace(length=text.length + agreed + 1, hidden=dense_NxD[agreed], token=token)
    token_N = jnp.append(steps.token, 0).at[agreed].set(token)
    return after, Played(token_N, agreed + 1, steps.action, steps.controllable, steps.seen)


def controller_of(cfg: Decoder, params: Any, plan_T: jax.Array) -> Controller:
    """The greedy policy, or without one the schedule `plan`."""
    if cfg.policy is None:
        return replay(plan_T)
    policy = policy_controller(Policy(cfg.policy), params, temperature=1.0, greedy=True)
    return by_kernels(policy, cfg.model.kernels)


@jit_by_row(whole=2, static=("cfg",), donate=(2,))
def play(
    weights: Weights, params: Any, text_B: TextState, budget_BxX: jax.Array, plan_BxT: jax.Array, cfg: Decoder
) -> tuple[TextState, Played]:
    """One episode of every text: under the greedy policy, or replaying `plan` if `params` is None."""

    def one(text: TextState, budget_X: jax.Array, plan_T: jax.Array) -> tuple[TextState, Played]:
        controller = controller_of(cfg, params, plan_T)
        steps, suffix, hidden_D = draft(weights, text, budget_X, controller, cfg)
        if cfg.lossless:
            return keep_agreed(weights, text, steps, cfg)
        return keep_all(weights, text, steps, suffix, hidden_D, cfg)

    return jax.vmap(one)(text_B, budget_BxX, plan_BxT)


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
