"""Quest's page bounds and page scores (arXiv 2406.10774)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class PageBounds(NamedTuple):
    """Elementwise largest and smallest key of each page: [..., P, d] each; (-inf, inf) for an empty page."""

    high: jax.Array
    low: jax.Array


def page_bounds(k_HxNxd: jax.Array, valid_N: jax.Array, page_size: int) -> PageBounds:
    """Bounds of consecutive pages of `page_size` keys, from the first on; the last page may be partial."""
    H, N, d = k_HxNxd.shape
    P = -(-N // page_size)
    pad = ((0, P * page_size - N),)
    k_HxPxpxd = jnp.pad(k_HxNxd, ((0, 0), *pad, (0, 0))).reshape(H, P, page_size, d)
    valid_Pxpx1 = jnp.pad(valid_N, pad).reshape(P, page_size, 1)
    return PageBounds(
        high=jnp.max(jnp.where(valid_Pxpx1, k_HxPxpxd, -jnp.inf), 2),
        low=jnp.min(jnp.where(valid_Pxpx1, k_HxPxpxd, jnp.inf), 2),
    )


def page_scores(q_HxGxd: jax.Array, bounds: PageBounds) -> jax.Array:
    """Upper bound of q.k over each page, `sum_d max(q_d high_d, q_d low_d)`: [H, G, P], float32.

    Empty pages score -inf.  One matmul: the positive part of q meets the highs, the negative the lows.
    """
    used_HxP = bounds.high[..., 0] >= bounds.low[..., 0]
    high, low = (jnp.where(used_HxP[..., None], b, 0) for b in bounds)
    signed_q = jnp.concatenate([jnp.maximum(q_HxGxd, 0), jnp.minimum(q_HxGxd, 0)], -1)
    extremes = jnp.concatenate([high, low], -1)
    score_HxGxP = jnp.einsum("hgd,hpd->hgp", signed_q, extremes, preferred_element_type=jnp.float32)
    return jnp.where(used_HxP[:, None], score_HxGxP, -jnp.inf)
