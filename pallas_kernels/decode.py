"""Attention of one decode step over a shared prefix and a schedule's own suffix."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import attention_gpu, attention_tpu, attention_triton
from pallas_kernels.cache import take_layer
from pallas_kernels.dispatch import choose, current_platform, interpret, logged, no_gradient, without_triton
from pallas_kernels.fold import fold_rows

KV = tuple[jax.Array, jax.Array]

# Up to this many query rows of a key/value head read the union of their pages from a list; more rows keep
# nearly every page between them, which is read in order.
LISTED_ROWS = 16


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
    *,
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention over the kept pages of a prefix and the kept entries of a suffix: [H, G, d], float32.

    The prefix is k and v of [H, S, d], of which the first `prefix_length` entries count; its mask is by page
    of `page_size` positions (1: by position).  With `layer` the prefix has a leading axis of layers, of which
    one is read in place.  The suffix is k and v of [H, T, d].  Masks broadcast over H and G.  "xla" is
    `split_attention`; kernels read the kept pages only, and once for all rows that share the prefix.
    jax-triton's reads lists of pages: with more than LISTED_ROWS rows "triton" is Pallas'.
    """
    name = choose("attend", implementation, log=False)

    def attended(*args: Any) -> jax.Array:
        q, prefix, suffix, keep_prefix, keep_suffix, length, layer = args
        if name == "xla":
            prefix = prefix if layer is None else tuple(take_layer(kv, layer) for kv in prefix)
            by_token = _keep_tokens(keep_prefix, length, page_size, prefix[0].shape[1])
            q = logged(q, "attend", implementation, name)
            return split_attention(q, prefix, suffix, by_token, keep_suffix)
        paged = _paged_attention(q, prefix, keep_prefix, length, layer, page_size, implementation)
        own = part_attention(q, suffix, keep_suffix)
        return normalize(merge_attention(jax.tree.map(lambda *two: jnp.stack(two), paged, own)))

    return no_gradient("attend", attended)(
        q_HxGxd, prefix, suffix, keep_prefix_HxGxP, keep_suffix_HxGxT, prefix_length, layer
    )


def paged_attention(
    q_HxGxd: jax.Array,
    prefix: KV,
    keep_HxGxP: jax.Array,
    length: jax.Array,
    page_size: int,
    *,
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> Part:
    """Attention over the kept pages of the prefix alone, as a part to be merged; arguments as in `attend`."""

    def attended(q: jax.Array, prefix: KV, keep: jax.Array, length: jax.Array, layer: Any) -> Part:
        return _paged_attention(q, prefix, keep, length, layer, page_size, implementation)

    return no_gradient("paged_attention", attended)(q_HxGxd, prefix, keep_HxGxP, length, layer)


def _paged_attention(
    q_HxGxd: jax.Array,
    prefix: KV,
    keep_HxGxP: jax.Array,
    length: jax.Array,
    layer: jax.Array | None,
    page_size: int,
    implementation: str | None,
) -> Part:
    P = -(-prefix[0].shape[-2] // page_size)
    if keep_HxGxP.shape[-1] != P:
        raise ValueError(
            f"paged_attention: {keep_HxGxP.shape[-1]} pages of {page_size} in the mask, and {P} in the cache"
        )
    if layer is None:
        prefix, layer = (prefix[0][None], prefix[1][None]), jnp.int32(0)
    keep_HxGxP = jnp.broadcast_to(keep_HxGxP, (*q_HxGxd.shape[:2], P))
    rows = functools.partial(_attend_rows, page_size=page_size, implementation=implementation)
    fold = fold_rows("paged_attention", rows)
    return Part(*fold(jnp.int32(layer), prefix, (q_HxGxd, keep_HxGxP, jnp.int32(length))))


def _attend_rows(
    layer: jax.Array, cache: KV, own: tuple[jax.Array, ...], page_size: int, implementation: str | None
) -> Part:
    """`Part`s [B, K, H, G, ...] of K rows of each of B sequences, with caches [B, L, H, S, d]."""
    q_BxKxHxGxd, keep_BxKxHxGxP, length_BxK = own
    B, K, H, G, d = q_BxKxHxGxd.shape
    dtype = jnp.promote_types(q_BxKxHxGxd.dtype, cache[0].dtype)
    facts: dict[str, Any] = {"rows": K * G, "tokens": B * cache[0].shape[3], "dtype": dtype.name}
    facts |= {"head_size": d, "page_size": page_size}
    op, named = "paged_attention", implementation
    if K * G > LISTED_ROWS:
        op, named = "shared_attention", without_triton(implementation)
    name = choose(op, named, log=False, **facts)
    q_BxKxHxGxd = logged(q_BxKxHxGxd, op, implementation, name, **facts)
    if name == "xla":

        def one(q: jax.Array, kv: KV, keep: jax.Array, length: jax.Array) -> Part:
            return part_attention(q, kv, _keep_tokens(keep, length, page_size, kv[0].shape[1]))

        of_layer = tuple(lax.dynamic_index_in_dim(kv, layer, 1, keepdims=False) for kv in cache)
        over_rows = jax.vmap(one, in_axes=(0, None, 0, 0))
        return jax.vmap(over_rows)(q_BxKxHxGxd, of_layer, keep_BxKxHxGxP, length_BxK)

    def rows(x: jax.Array) -> jax.Array:
        return x.swapaxes(1, 2).reshape(B, H, K * G, *x.shape[4:])

    on = _on_tpu if current_platform() == "tpu" else functools.partial(_on_gpu, triton=name == "triton")
    q_BxHxRxd = rows(q_BxKxHxGxd).astype(dtype)
    part = on(layer, q_BxHxRxd, cache, rows(keep_BxKxHxGxP), jnp.repeat(length_BxK, G, 1), page_size)
    return jax.tree.map(lambda x: x.reshape(B, H, K, G, *x.shape[3:]).swapaxes(1, 2), part)


def _on_gpu(
    layer: jax.Array,
    q_BxHxRxd: jax.Array,
    cache: KV,
    keep_BxHxRxP: jax.Array,
    length_BxR: jax.Array,
    page_size: int,
    triton: bool,
) -> Part:
    bits_BxHxWxP = attention_gpu.pack_rows(keep_BxHxRxP)
    if triton:
        pages = attention_gpu.list_pages(bits_BxHxWxP[:, :, 0], interpret())
        parts = attention_triton.attend(layer, q_BxHxRxd, *cache, pages, length_BxR, page_size)
    else:
        listed = q_BxHxRxd.shape[2] <= LISTED_ROWS
        read = attention_gpu.list_pages(bits_BxHxWxP[:, :, 0], interpret()) if listed else bits_BxHxWxP
        parts = attention_gpu.attend(layer, q_BxHxRxd, *cache, read, length_BxR, page_size, interpret())
    return merge_attention(Part(*(jnp.moveaxis(x, 2, 0) for x in parts)))


def _on_tpu(
    layer: jax.Array,
    q_BxHxRxd: jax.Array,
    cache: KV,
    keep_BxHxRxP: jax.Array,
    length_BxR: jax.Array,
    page_size: int,
) -> Part:
    (*_, S, d), P = cache[0].shape, keep_BxHxRxP.shape[-1]
    before_P = jnp.arange(P) * page_size
    seen = jnp.clip(length_BxR[:, None, :, None] - before_P, 0, page_size)
    visible_BxHxRxP = jnp.where(keep_BxHxRxP, seen, 0).astype(jnp.float32)
    if q_BxHxRxd.shape[2] <= LISTED_ROWS:
        kept_BxHxP = jnp.any(visible_BxHxRxP > 0, 2)
        page_BxHxP = jnp.argsort(~kept_BxHxP, stable=True).astype(jnp.int32)
        count_BxH = jnp.sum(kept_BxHxP, -1, dtype=jnp.int32)
        listed_BxHxRxP = jnp.take_along_axis(visible_BxHxRxP, page_BxHxP[:, :, None], -1)
        # No copy if the cache was allocated in whole pages.
        pad = ((0, 0),) * 3 + ((0, P * page_size - S), (0, 0))
        k, v = (jnp.pad(kv, pad).reshape(*kv.shape[:3], P, page_size, d) for kv in cache)
        parts = attention_tpu.attend_listed(
            layer, count_BxH, page_BxHxP, q_BxHxRxd, k, v, listed_BxHxRxP, interpret()
        )
    else:
        limit_B = jnp.max(length_BxR, -1)
        parts = attention_tpu.attend_whole(
            layer, limit_B, q_BxHxRxd, *cache, visible_BxHxRxP, page_size, interpret()
        )
    mixed, top, total = parts
    return Part(mixed, top[..., 0], total[..., 0])


def part_attention(q_HxGxd: jax.Array, kv: KV, keep_HxGxN: jax.Array) -> Part:
    """Attention over the kept entries of k and v [H, N, d]."""
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
    """Attention over the keys of all parts [N, ...], which are disjoint."""
    top = jnp.max(parts.top, 0)
    fade = jnp.exp(parts.top - _finite(top))
    return Part(jnp.sum(parts.mixed * fade[..., None], 0), top, jnp.sum(parts.total * fade, 0))


def normalize(part: Part) -> jax.Array:
    """The softmax' mean of the values; 0 over no key."""
    return part.mixed / jnp.where(part.total == 0, 1.0, part.total)[..., None]


def _finite(top: jax.Array) -> jax.Array:
    """What to subtract from logits of at most `top`: exp(-inf - 0) is 0 where exp(-inf + inf) is NaN."""
    return jnp.where(top == -jnp.inf, 0.0, top)


def _keep_tokens(keep: jax.Array, length: jax.Array, page_size: int, S: int) -> jax.Array:
    """A mask by page [..., P] as one by token [..., S], of the first `length` tokens."""
    return jnp.repeat(keep, page_size, -1)[..., :S] & (jnp.arange(S) < length)


def split_attention(
    q_HxGxd: jax.Array,
    prefix: KV,
    suffix: KV,
    keep_prefix_HxGxS: jax.Array,
    keep_suffix_HxGxT: jax.Array,
) -> jax.Array:
    """Softmax attention over the kept entries of two caches: [H, G, d], float32.

    The caches are k and v of [H, S, d] and of [H, T, d]; `H` counts key/value heads and `G` the query heads
    of each; masks broadcast over H and G.  Vmapped over schedules with the prefix unbatched, the schedules
    become rows of one matrix product: the prefix is read once for all of them and never copied.
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
