"""Episodes over tokens that are forced instead of drawn, as pure functions: what `continuations` is made of.

All of a context but its last token is prefilled densely; that token and the continuation are then consumed in
episodes of T steps, so that every token of a continuation is predicted by a step of the controller's. At an
episode's end its cache entries are replaced by dense ones and the policy starts anew, as in generation
(docs/method.md, "Generation").  As the tokens are known, the dense entries of all of them come from one dense
pass, and the episodes, each behind the dense cache of what precedes it, run side by side.

Here `U` counts contexts and `N` the steps of a continuation, filled up to W whole episodes (or to a single
one that ends early).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sol_jax.generation.episodes import HEAD_ROWS, Decoder, prefill_prompt
from sol_jax.models import llama
from sol_jax.models.llama import KVCache, Weights
from sol_jax.models.sharding import jit_by_row
from sol_jax.rl.policy import Policy
from sol_jax.rl.rollout import Episode, label_logp, policy_controller, replay, rollout

DENSE_TOKENS = 256  # that the dense pass over continuations takes at a time, or those of one


class PrefilledContext(NamedTuple):
    """A context after its prefill; those of a batch lead with U."""

    hidden: jax.Array  # [D], of the last token
    cache: KVCache
    length: jax.Array


class GivenTokens(NamedTuple):
    """A continuation; those of a batch lead with B."""

    context: Any  # which of the contexts; like the rest an array of the host's before it is scored
    token: Any  # [N], consumed: the last one of the context, then the continuation
    label: Any  # [N], predicted: the continuation


@jit_by_row(whole=1, static=("capacity", "cfg"))
def prefill_contexts(
    weights: Weights, tokens_UxS: jax.Array, length_U: jax.Array, capacity: int, cfg: Decoder
) -> PrefilledContext:
    """Dense caches of the first `length` tokens of each line."""

    def one(tokens_S: jax.Array, length: jax.Array) -> PrefilledContext:
        return PrefilledContext(*prefill_prompt(weights, tokens_S, length, capacity, cfg.model), length)

    batch = min(cfg.prefill_batch, len(tokens_UxS))
    return lax.map(lambda context: one(*context), (tokens_UxS, length_U), batch_size=batch)


def dense_pass(
    weights: Weights, context_U: PrefilledContext, given_B: GivenTokens, cfg: Decoder
) -> tuple[jax.Array, PrefilledContext]:
    """Dense hidden states of the consumed tokens [B, N, D], and every row with all of them in its cache."""

    def one(given: GivenTokens) -> tuple[jax.Array, PrefilledContext]:
        row = jax.tree.map(lambda leaf: leaf[given.context], context_U)
        hidden_NxD, entries = llama.extend(weights, given.token, row.cache, row.length, cfg.model)
        return hidden_NxD, row._replace(cache=llama.append(row.cache, entries, row.length, cfg.model.kernels))

    B, N = given_B.token.shape
    return lax.map(one, given_B, batch_size=min(B, max(1, DENSE_TOKENS // N)))


def judge(weights: Weights, hidden: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each label under its hidden state, and whether it is the most likely token."""

    def one(hidden_D: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        best = jnp.argmax(llama.logits(weights, hidden_D))
        return label_logp(weights, hidden_D, label), best == label

    flat = hidden.reshape(-1, hidden.shape[-1]), label.reshape(-1)
    with jax.named_scope("head"):
        found = lax.map(lambda x: one(*x), flat, batch_size=min(HEAD_ROWS, label.size))
    return jax.tree.map(lambda leaf: leaf.reshape(label.shape), found)


@jit_by_row(whole=1, static=("cfg",))
def score_densely(weights: Weights, context_U: PrefilledContext, given_B: GivenTokens, cfg: Decoder) -> tuple:
    """`logp` and `greedy` of every label, without a controller."""
    hidden_BxNxD, _ = dense_pass(weights, context_U, given_B, cfg)
    return judge(weights, hidden_BxNxD, given_B.label)


@jit_by_row(whole=2, static=("cfg",))
def score_controlled(
    weights: Weights,
    params: Any,
    context_U: PrefilledContext,
    given_B: GivenTokens,
    budget_BxX: jax.Array,
    plan_BxN: jax.Array,
    cfg: Decoder,
) -> tuple:
    """`logp`, `greedy`, `action` and `controllable` of every label, [B, N] each.

    Under the greedy policy of `params`, or replaying `plan` if there is none.
    """
    dense_BxNxD, row_B = dense_pass(weights, context_U, given_B, cfg)
    (B, N), space = given_B.token.shape, cfg.space
    T = min(N, cfg.horizon)

    def one(
        row: PrefilledContext,
        dense_NxD: jax.Array,
        given: GivenTokens,
        budget_X: jax.Array,
        plan_N: jax.Array,
    ):
        start_W = row.length + T * jnp.arange(N // T)
        cache = llama.index_cache(row.cache, space.axes)
        hidden_WxD = jnp.concatenate([row.hidden[None], dense_NxD[T - 1 : N - 1 : T]])
        episode_W = Episode(start_W, hidden_WxD, given.token.reshape(-1, T), given.label.reshape(-1, T))

        def play(episode: Episode, plan_T: jax.Array) -> tuple[jax.Array, ...]:
            controller = replay(plan_T)
            if cfg.policy is not None:
                controller = policy_controller(Policy(cfg.policy), params, temperature=1.0, greedy=True)
            key = jax.random.key(0)  # nothing is drawn
            played = rollout(weights, cfg.rules, cache, episode, key, budget_X, controller)
            taken_T = jnp.where(played.controllable, played.action, space.dense)
            return played.hidden, taken_T, played.controllable, jnp.isfinite(played.logp)

        return jax.vmap(play)(episode_W, plan_N.reshape(-1, T))

    with jax.named_scope("rollout"):
        played = jax.vmap(one)(row_B, dense_BxNxD, given_B, budget_BxX, plan_BxN)
        hidden, action, controllable, chosen = played
    logp, greedy = judge(weights, hidden.reshape(dense_BxNxD.shape), given_B.label)
    # A policy whose logits are no numbers picks actions all the same.
    logp = jnp.where(chosen.reshape(B, N), logp, jnp.nan)
    return logp, greedy, action.reshape(B, N), controllable.reshape(B, N)
