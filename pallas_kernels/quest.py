"""Quest's page bounds and page scores (arXiv 2406.10774).

The bounds of a page are one vector of 2d numbers: the elementwise largest of its keys, then the smallest.
An empty page has bounds (-inf, inf).
"""

import jax
import jax.numpy as jnp


def page_bounds(k_HxNxd: jax.Array, valid_N: jax.Array, page_size: int) -> jax.Array:
    """Bounds [H, P, 2d] of consecutive pages of `page_size` keys; the last page may be partial."""
    H, N, d = k_HxNxd.shape
    P = -(-N // page_size)
    pad = (0, P * page_size - N)
    k_HxPxpxd = jnp.pad(k_HxNxd, ((0, 0), pad, (0, 0))).reshape(H, P, page_size, d)
    valid_Pxpx1 = jnp.pad(valid_N, pad).reshape(P, page_size, 1)
    high = jnp.max(jnp.where(valid_Pxpx1, k_HxPxpxd, -jnp.inf), 2)
    low = jnp.min(jnp.where(valid_Pxpx1, k_HxPxpxd, jnp.inf), 2)
    return jnp.concatenate([high, low], -1)


def extend_bounds(bounds_HxPx2d: jax.Array, k_Hxd: jax.Array, page_P: jax.Array) -> jax.Array:
    """The bounds once a key is added to the pages marked in the mask `page_P`."""
    high, low = jnp.split(bounds_HxPx2d, 2, -1)
    k_Hx1xd = k_Hxd[:, None]
    extended = jnp.concatenate([jnp.maximum(high, k_Hx1xd), jnp.minimum(low, k_Hx1xd)], -1)
    return jnp.where(page_P[:, None], extended, bounds_HxPx2d)


def page_scores(q_HxGxd: jax.Array, bounds_HxPx2d: jax.Array, used_P: jax.Array) -> jax.Array:
    """Upper bound of q.k over each page, `sum_d max(q_d high_d, q_d low_d)`: [H, G, P], float32.

    Pages not in the mask `used_P` score -inf.  One matrix product: the positive part of q meets the highs,
    the negative part the lows.
    """
    finite = jnp.where(used_P[:, None], bounds_HxPx2d, 0)
    signed_q = jnp.concatenate([jnp.maximum(q_HxGxd, 0), jnp.minimum(q_HxGxd, 0)], -1)
    score_HxGxP = jnp.einsum("hgc,hpc->hgp", signed_q, finite, preferred_element_type=jnp.float32)
    return jnp.where(used_P, score_HxGxP, -jnp.inf)
