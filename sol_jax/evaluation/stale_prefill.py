"""The fault in the authors' evaluation, on purpose: a prefill under token budgets left over from before.

Under Quest their loops set a number of tokens for each row at every decode step and do not clear it before
the next batch.  So from the second batch on each prefill query attends only to its best pages, as many as
that number of tokens fills.  For comparison only; nothing else in this project prefills so.

Source: docs/method.md, "What the authors' code does otherwise"; the authors' mask (vectors `causal_q5`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.quest import page_bounds, page_scores
from pallas_kernels.topk import at_least_kth
from sol_jax.axes.kappa import Quest
from sol_jax.axes.key_selection import float32_ceil
from sol_jax.evaluation.scoring import PrefilledBatch, with_embeddings
from sol_jax.models import llama
from sol_jax.models.llama import KVCache, Weights
from sol_jax.models.sharding import jit_by_row
from sol_jax.rl.rollout import Episode, PrefilledBlock
from sol_jax.rl.setup import Setup


def leftover_rows(values_BxX: np.ndarray, kappa: int, num_rows: int) -> np.ndarray:
    """Whose token budget each row of the next batch is left with: indices [num_rows] into this batch.

    The authors decode the rows of each pair of rho and bits apart, in ascending order of the pairs, so the
    last such call's budgets remain: those of the rows with the largest pair.  They are repeated, or cut
    short, to fit the next batch.

    Args:
      values_BxX: the levels each row took in the last step; `kappa` is the column of the token axis.
      num_rows: rows of the next batch.
    """
    others = [tuple(row) for row in np.delete(values_BxX, kappa, 1)]
    last = max(others)
    rows = np.flatnonzero([pair == last for pair in others])
    return rows[np.arange(num_rows) % len(rows)]


def quest_keep(q_HxGxSxd: jax.Array, k_HxSxd: jax.Array, num_tokens: jax.Array, page_size: int) -> jax.Array:
    """Which keys each query of a sequence attends to when `num_tokens` are left to it: [H, G, S, S].

    Never a later key.  The bounds of a page are those of all its keys, also of the ones after the query, and
    a page counts as soon as its first key may be attended to; so a query with few keys sees all of them.
    """
    S = k_HxSxd.shape[1]
    bounds = page_bounds(k_HxSxd, jnp.ones(S, bool), page_size, "xla")
    P = bounds.shape[1]

    def of_query(q_HxGxd: jax.Array, position: jax.Array) -> jax.Array:
        page = position // page_size
        score = page_scores(q_HxGxd, bounds, jnp.arange(P) <= page)
        tokens = jnp.clip(num_tokens, 1, position + 1)
        pages = jnp.minimum((tokens + page_size - 1) // page_size, page + 1)
        keep = at_least_kth(score, jnp.broadcast_to(pages, score.shape[:-1]))
        return jnp.repeat(keep, page_size, -1)[..., :S] & (jnp.arange(S) <= position)

    return jax.vmap(of_query, (2, 0), 2)(q_HxGxSxd, jnp.arange(S))


def sparse_prefill(
    weights: Weights, tokens_S: jax.Array, num_tokens: jax.Array, page_size: int, setup: Setup
) -> tuple[jax.Array, KVCache]:
    """`llama.prefill` with `num_tokens` to attend to in every layer and head."""
    cfg = setup.model
    H, G, d = cfg.num_kv_heads, cfg.group_size, cfg.head_size

    def attend(q_SxHxd: jax.Array, k_HxSxd: jax.Array, v_HxSxd: jax.Array) -> jax.Array:
        q_HxGxSxd = q_SxHxd.reshape(-1, H, G, d).transpose(1, 2, 0, 3)

        def head(qkv: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            q_1xGxSxd, k_1xSxd, v_1xSxd = (x[None] for x in qkv)
            keep = quest_keep(q_1xGxSxd, k_1xSxd, num_tokens, page_size)
            logit = jnp.einsum("hgsd,hnd->hgsn", q_1xGxSxd, k_1xSxd, preferred_element_type=jnp.float32)
            weight = jax.nn.softmax(jnp.where(keep, logit * d**-0.5, -jnp.inf))
            cast = weight.astype(v_1xSxd.dtype)
            return jnp.einsum("hgsn,hnd->hgsd", cast, v_1xSxd, preferred_element_type=jnp.float32)[0]

        # One head at a time: its scores are [G, S, S].
        mixed_HxGxSxd = lax.map(head, (q_HxGxSxd, k_HxSxd, v_HxSxd))
        return mixed_HxGxSxd.transpose(2, 0, 1, 3).reshape(q_SxHxd.shape)

    return llama.prefill(weights, tokens_S, cfg, attend)


@jit_by_row(whole=2, static=("setup",))
def stale_prefill(weights: Weights, kappa: Any, tokens_BxN: jax.Array, setup: Setup) -> PrefilledBatch:
    """A batch of blocks (one episode each) prefilled under the budget that level `kappa` left at its end."""
    quest = next(axis for axis in setup.space.axes if isinstance(axis, Quest))
    S, T = setup.episode.prefix_len, setup.episode.horizon
    num_tokens = jnp.minimum(float32_ceil(kappa, jnp.int32(S + T)), S + T)

    def cut(tokens_N: jax.Array) -> PrefilledBlock:
        hidden_SxD, kv = sparse_prefill(weights, tokens_N[:S], num_tokens, quest.page_size, setup)
        token_1xT, label_1xT = tokens_N[None, S : S + T], tokens_N[None, S + 1 : S + T + 1]
        episodes = Episode(jnp.array([S], jnp.int32), hidden_SxD[-1:], token_1xT, label_1xT)
        return PrefilledBlock(llama.index_cache(kv, setup.space.axes), episodes)

    return with_embeddings(weights, tokens_BxN, lax.map(cut, tokens_BxN), setup)
