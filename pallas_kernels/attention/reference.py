"""Attention of a decode step in plain JAX: over two caches at once, or in parts that are merged.

`H` counts key/value heads, `G` the query heads of each, `S` entries of the prefix, `T` of the suffix, `N` of
any of them, `P` pages of the prefix and `d` channels of a head.  Masks broadcast over H and G.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.cache import take_layer

KV = tuple[jax.Array, jax.Array]


class Part(NamedTuple):
    """Attention over some of the keys: values weighted by exp(logit - top), the top logit, the weights' sum.

    Over no key the top is -inf and the rest 0.
    """

    mixed: jax.Array  # [..., d], float32
    top: jax.Array
    total: jax.Array


def attend(
    q_HxGxd: jax.Array,
    prefix: KV,
    suffix: KV,
    keep_prefix_HxGxP: jax.Array,
    keep_suffix_HxGxT: jax.Array,
    prefix_length: jax.Array,
    page_size: int,
    layer: jax.Array | None = None,
) -> jax.Array:
    """Returns `split_attention` [H, G, d] with a mask of the prefix by page.

    With `layer` the prefix [L, H, S, d] has a leading axis of layers, of which one is taken.
    """
    k_HxSxd, v_HxSxd = prefix if layer is None else (take_layer(kv, layer) for kv in prefix)
    by_token = keep_tokens(keep_prefix_HxGxP, prefix_length, page_size, k_HxSxd.shape[1])
    return split_attention(q_HxGxd, (k_HxSxd, v_HxSxd), suffix, by_token, keep_suffix_HxGxT)


def split_attention(
    q_HxGxd: jax.Array,
    prefix: KV,
    suffix: KV,
    keep_prefix_HxGxS: jax.Array,
    keep_suffix_HxGxT: jax.Array,
) -> jax.Array:
    """Returns softmax attention over the kept entries of two caches: [H, G, d], float32.

    The caches are k and v of [H, S, d] and of [H, T, d].  Vmapped over schedules with the prefix unbatched,
    the schedules become rows of one matrix product: the prefix is read once for all of them and never copied.
    """
    (k_HxSxd, v_HxSxd), (k_HxTxd, v_HxTxd) = prefix, suffix

    def logits(k_HxNxd: jax.Array, keep: jax.Array) -> jax.Array:
        logit = jnp.einsum("hgd,hnd->hgn", q_HxGxd, k_HxNxd, preferred_element_type=jnp.float32)
        return jnp.where(keep, logit * q_HxGxd.shape[-1] ** -0.5, -jnp.inf)

    def mix(weight: jax.Array, v_HxNxd: jax.Array) -> jax.Array:
        cast = weight.astype(v_HxNxd.dtype)
        return jnp.einsum("hgn,hnd->hgd", cast, v_HxNxd, preferred_element_type=jnp.float32)

    logit_S, logit_T = logits(k_HxSxd, keep_prefix_HxGxS), logits(k_HxTxd, keep_suffix_HxGxT)
    top = jnp.maximum(jnp.max(logit_S, -1, keepdims=True), jnp.max(logit_T, -1, keepdims=True))
    weight_S, weight_T = jnp.exp(logit_S - top), jnp.exp(logit_T - top)
    total = jnp.sum(weight_S, -1, keepdims=True) + jnp.sum(weight_T, -1, keepdims=True)
    return (mix(weight_S, v_HxSxd) + mix(weight_T, v_HxTxd)) / total


def paged_attention(
    q_HxGxd: jax.Array, prefix: KV, keep_HxGxP: jax.Array, length: jax.Array, page_size: int
) -> Part:
    """Returns attention over the kept pages of a prefix [H, S, d], whose first `length` entries count."""
    keep_HxGxS = keep_tokens(keep_HxGxP, length, page_size, prefix[0].shape[1])
    return part_attention(q_HxGxd, prefix, keep_HxGxS)


def part_attention(q_HxGxd: jax.Array, kv: KV, keep_HxGxN: jax.Array) -> Part:
    """Returns attention over the kept entries of k and v [H, N, d]."""
    k_HxNxd, v_HxNxd = kv
    logit = jnp.einsum("hgd,hnd->hgn", q_HxGxd, k_HxNxd, preferred_element_type=jnp.float32)
    logit = jnp.where(keep_HxGxN, logit * q_HxGxd.shape[-1] ** -0.5, -jnp.inf)
    top = jnp.max(logit, -1)
    weight = jnp.exp(logit - _finite(top)[..., None])
    mixed = jnp.einsum(
        "hgn,hnd->hgd", weight.astype(v_HxNxd.dtype), v_HxNxd, preferred_element_type=jnp.float32
    )
    return Part(mixed, top, jnp.sum(weight, -1))


def merge_attention(parts: Part) -> Part:
    """Returns attention over the keys of all parts [N, ...], which are disjoint."""
    top = jnp.max(parts.top, 0)
    fade = jnp.exp(parts.top - _finite(top))
    return Part(jnp.sum(parts.mixed * fade[..., None], 0), top, jnp.sum(parts.total * fade, 0))


def normalize(part: Part) -> jax.Array:
    """Returns the softmax' mean of the values; 0 over no key."""
    return part.mixed / jnp.where(part.total == 0, 1.0, part.total)[..., None]


def _finite(top: jax.Array) -> jax.Array:
    """Returns what to subtract from logits of at most `top`: exp(-inf - 0) is 0, and exp(-inf + inf) NaN."""
    return jnp.where(top == -jnp.inf, 0.0, top)


def keep_tokens(keep: jax.Array, length: jax.Array, page_size: int, S: int) -> jax.Array:
    """Returns a mask by page [..., P] as one by token [..., S], of the first `length` tokens."""
    return jnp.repeat(keep, page_size, -1)[..., :S] & (jnp.arange(S) < length)
