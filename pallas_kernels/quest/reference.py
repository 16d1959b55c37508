"""Quest in plain JAX: page bounds, page scores and the choice of pages (arXiv 2406.10774).

`H` counts key/value heads, `G` the query heads of each, `P` pages and `d` channels of a head.  The bounds of
a page are one vector of 2d numbers: the elementwise largest of its keys, then the smallest.  An empty page
has the bounds (-inf, inf).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.topk import at_least_kth


def page_bounds(k_HxNxd: jax.Array, valid_N: jax.Array, page_size: int) -> jax.Array:
    """Returns the bounds [H, P, 2d] of consecutive pages of `page_size` keys.

    Keys outside the mask `valid_N` do not count, and the last page may be partial.
    """
    H, N, d = k_HxNxd.shape
    P = -(-N // page_size)
    pad = (0, P * page_size - N)
    k_HxPxpxd = jnp.pad(k_HxNxd, ((0, 0), pad, (0, 0))).reshape(H, P, page_size, d)
    valid_Pxpx1 = jnp.pad(valid_N, pad).reshape(P, page_size, 1)
    high = jnp.max(jnp.where(valid_Pxpx1, k_HxPxpxd, -jnp.inf), 2)
    low = jnp.min(jnp.where(valid_Pxpx1, k_HxPxpxd, jnp.inf), 2)
    return jnp.concatenate([high, low], -1)


def extend_bounds(bounds_HxPx2d: jax.Array, k_Hxd: jax.Array, page_P: jax.Array) -> jax.Array:
    """Returns the bounds [H, P, 2d] once a key is added to the pages marked in the mask `page_P`."""
    high, low = jnp.split(bounds_HxPx2d, 2, -1)
    k_Hx1xd = k_Hxd[:, None]
    extended = jnp.concatenate([jnp.maximum(high, k_Hx1xd), jnp.minimum(low, k_Hx1xd)], -1)
    return jnp.where(page_P[:, None], extended, bounds_HxPx2d)


def page_scores(q_HxGxd: jax.Array, bounds_HxPx2d: jax.Array, used_P: jax.Array) -> jax.Array:
    """Returns an upper bound of q.k over each page, `sum_d max(q_d high_d, q_d low_d)`: [H, G, P], float32.

    Pages not in the mask `used_P` score -inf.  The scores are one matrix product: the positive part of q
    meets the highs, the negative part the lows.
    """
    finite = jnp.where(used_P[:, None], bounds_HxPx2d, 0)
    score_HxGxP = jnp.einsum("hgc,hpc->hgp", signed(q_HxGxd), finite, preferred_element_type=jnp.float32)
    return jnp.where(used_P, score_HxGxP, -jnp.inf)


def signed(q: jax.Array) -> jax.Array:
    """Returns the positive parts of q [..., d], then the negative ones: [..., 2d]."""
    return jnp.concatenate([jnp.maximum(q, 0), jnp.minimum(q, 0)], -1)


def select(
    scores: Sequence[jax.Array], used: Sequence[jax.Array], pages: jax.Array, select: str
) -> tuple[jax.Array, ...]:
    """Returns each part's mask [B, K, H, G, P] of the pages whose score is at least the `pages`-th highest.

    The parts have scores [B, H, K, G, P] and masks [B, K, P] of the pages in use, and are ranked together.
    With "group" for `select` the heads of a group rank pages by the sum of their scores; with "head" each has
    its own rank.
    """
    parts = [
        jnp.where(mask[:, :, None, None], score.swapaxes(1, 2), -jnp.inf)
        for score, mask in zip(scores, used, strict=True)
    ]
    score = jnp.concatenate(parts, -1)
    if select == "group":
        score = jnp.broadcast_to(jnp.sum(score, 3, keepdims=True), score.shape)
    keep = at_least_kth(score, jnp.broadcast_to(pages[:, :, None, None], score.shape[:-1]))
    ends = [sum(part.shape[-1] for part in parts[: i + 1]) for i in range(len(parts) - 1)]
    return tuple(jnp.split(keep, ends, -1))
