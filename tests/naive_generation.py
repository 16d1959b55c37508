"""Generation as docs/method.md says it, one text, one token at a time: what the engine is tested against.

Nothing is padded, batched or kept in place: at every episode's start the cache is computed anew.  Of the
project it uses the prefill, the decode step, the policy's whole-episode face and the sampling rules.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sol_jax.generation.episodes import Decoder, keys_at
from sol_jax.generation.sampling import draw, token_logp
from sol_jax.models import llama
from sol_jax.rl.policy import Observation, Policy, PolicySpec, budget_gap, progress

decode = functools.partial(jax.jit, static_argnames=("axes", "cfg"))(llama.decode_step)
prefill = functools.partial(jax.jit, static_argnames="cfg")(llama.prefill)


class Naive(NamedTuple):
    tokens: list[int]  # generated
    actions: list[int]  # of the step that drew each token but the first


@functools.partial(jax.jit, static_argnames="rule")
def next_token(weights, hidden_D, key, position, rule):
    return draw(keys_at(key, position).draw, token_logp(llama.logits(weights, hidden_D), rule), rule)


def generate(weights, cfg: Decoder, prompt, num_tokens, seed=0, budget=(), params=None, plan=None) -> Naive:
    """`plan(episode, step)` gives the action, unless there are `params` of a policy."""
    key = jax.random.key(seed)
    tokens = list(prompt)
    hidden_SxD, cache = prefill(weights, jnp.array(tokens), cfg.model)
    hidden_D = hidden_SxD[-1]
    tokens.append(int(next_token(weights, hidden_D, key, len(tokens), cfg.sampling)))
    actions: list[int] = []
    while len(tokens) - len(prompt) < num_tokens:
        episode, begin = len(actions) // cfg.horizon, len(tokens) - 1
        if cfg.refresh and episode % cfg.refresh_every == 0:
            hidden_SxD, cache = prefill(weights, jnp.array(tokens[:-1]), cfg.model)
            hidden_D = hidden_SxD[-1]
        prefix = llama.index_cache(cache, cfg.space.axes).prefix(begin)
        suffix = llama.empty_suffix(prefix, cfg.horizon, cfg.space.axes)
        seen: list[Observation] = []
        costs: list[np.ndarray] = []
        chosen = cfg.space.num_actions
        for t in range(cfg.horizon):
            controllable = begin + t + 1 > cfg.rules.episode.uncontrolled
            total = np.sum(costs, 0) if costs else np.zeros(len(cfg.space.axes))
            seen.append(
                Observation(
                    hidden=hidden_D,
                    embed=llama.embed(weights, jnp.int32(tokens[-1])),
                    progress=progress(t, cfg.horizon),
                    controllable=jnp.float32(controllable),
                    target=jnp.array(budget, jnp.float32),
                    gap=budget_gap(total, len(costs), jnp.array(budget)),
                    prev_action=jnp.int32(chosen),
                    num_keys=jnp.int32(begin + t + 1),
                    logit=llama.logits(weights, hidden_D)[tokens[-1]],
                )
            )
            chosen = int(choose(params, seen, cfg.policy)) if params is not None else plan(episode, t)
            action = chosen if controllable else cfg.space.dense
            if controllable:
                costs.append(cfg.space.costs_AxX[action])
            values_X = jnp.asarray(cfg.space.values_AxX[action])
            args = jnp.int32(tokens[-1]), jnp.int32(t), values_X, cfg.space.axes, cfg.model
            hidden_D, suffix = decode(weights, prefix, suffix, *args)
            actions.append(int(action))
            tokens.append(int(next_token(weights, hidden_D, key, len(tokens), cfg.sampling)))
        if not cfg.refresh or cfg.refresh_every > 1:
            cache = jax.tree.map(lambda old, new: jnp.concatenate([old, new], 2), cache, suffix.cache)
    generated = tokens[len(prompt) :][:num_tokens]
    return Naive(generated, actions[: num_tokens - 1])


@functools.partial(jax.jit, static_argnames="policy")
def choose(params, seen: list[Observation], policy: PolicySpec):
    """The policy's most likely action, from all that the episode has shown."""
    episode = jax.tree.map(lambda *steps: jnp.stack(steps), *seen)
    return jnp.argmax(Policy(policy).apply(params, episode)[-1])


def greedy_by_full_forward(weights, model, prompt, num_tokens) -> list[int]:
    """The dense model's greedy continuation, each token from a forward pass over the whole text."""
    tokens = list(prompt)
    padded = np.zeros(len(prompt) + num_tokens, np.int32)
    for _ in range(num_tokens):
        padded[: len(tokens)] = tokens
        hidden_SxD, _ = prefill(weights, jnp.array(padded), model)
        tokens.append(int(jnp.argmax(llama.logits(weights, hidden_SxD[len(tokens) - 1]))))
    return tokens[len(prompt) :]
