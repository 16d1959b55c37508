"""Attention's operations, which pick an implementation: `reference` in XLA, or a kernel.

The kernels are in `gpu` and `tpu` (Pallas) and in `triton` (jax-triton, for NVIDIA GPUs).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import native
from pallas_kernels.attention import gpu, reference, tpu, triton
from pallas_kernels.attention.reference import KV, Part, merge_attention, normalize, part_attention
from pallas_kernels.dispatch import choose, current_platform, interpret, no_gradient, without_triton
from pallas_kernels.fold import fold_rows

# Up to this many query rows of a key/value head read the union of their pages from a list; more rows keep
# nearly every page between them, which is read in order.
LISTED_ROWS = 16


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
    """Returns softmax attention over kept pages of a prefix and kept entries of a suffix: [H, G, d], float32.

    The prefix is k and v of [H, S, d], of which the first `prefix_length` entries count; its mask is by page
    of `page_size` positions (1: by position).  With `layer` the prefix has a leading axis of layers, of which
    one is read in place.  The suffix is k and v of [H, T, d].  Masks broadcast over H and G.

    "xla" is `split_attention`; kernels read the kept pages only, and once for all rows that share the prefix.
    jax-triton's kernel reads lists of pages, so "triton" is Pallas' kernel with more than LISTED_ROWS rows.
    """
    dtype = prefix[0].dtype.name
    asks_again = current_platform() != "cpu"  # where the rows decide
    name = choose("attend", implementation, asks_again=asks_again, dtype=dtype)

    def attended(*args: Any) -> jax.Array:
        q, prefix, suffix, keep_prefix, keep_suffix, length, layer = args
        if name == "xla":
            return reference.attend(q, prefix, suffix, keep_prefix, keep_suffix, length, page_size, layer)
        if name == "native":
            masks = keep_prefix, keep_suffix
            return _attend_on_cpu(q, prefix, suffix, masks, length, layer, page_size)
        paged = _paged_attention(q, prefix, keep_prefix, length, layer, page_size, implementation)
        own = part_attention(q, suffix, keep_suffix)
        return normalize(merge_attention(jax.tree.map(lambda *two: jnp.stack(two), paged, own)))

    return no_gradient("attend", attended)(
        q_HxGxd, prefix, suffix, keep_prefix_HxGxP, keep_suffix_HxGxT, prefix_length, layer
    )


def _attend_on_cpu(
    q_HxGxd: jax.Array,
    prefix: KV,
    suffix: KV,
    masks: tuple[jax.Array, jax.Array],
    length: jax.Array,
    layer: jax.Array | None,
    page_size: int,
) -> jax.Array:
    """Returns `attend` by one call for prefix and suffix.

    Masks stay as small as they came: those of dense steps are the same for all heads.
    """
    if layer is None:
        prefix, layer = (prefix[0][None], prefix[1][None]), jnp.int32(0)

    def rows(layer: jax.Array, cache: KV, own: tuple[Any, ...]) -> jax.Array:
        q_BxKxHxGxd, suffix, keep, own_keep, length_BxK = own
        dtype = cache[0].dtype
        operand = q_BxKxHxGxd.astype(dtype).astype(jnp.float32)
        args = operand, *cache, *(kv.astype(dtype) for kv in suffix), keep, own_keep, length_BxK
        return native.call("attend", [native.floats(*operand.shape)], layer, *args, page_size=page_size)[0]

    own = q_HxGxd, suffix, *masks, jnp.int32(length)
    return fold_rows("attend", rows)(jnp.int32(layer), prefix, own)


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
    """Returns attention over the kept pages of the prefix alone, as a part to be merged.

    The arguments are those of `attend`.  Raises ValueError if the mask has not one entry a page.
    """

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
    """Returns `Part`s [B, K, H, G, ...] of K rows of each of B sequences, with caches [B, L, H, S, d]."""
    q_BxKxHxGxd, keep_BxKxHxGxP, length_BxK = own
    B, K, H, G, d = q_BxKxHxGxd.shape
    dtype = jnp.promote_types(q_BxKxHxGxd.dtype, cache[0].dtype)
    facts: dict[str, Any] = {"rows": K * G, "tokens": B * cache[0].shape[3], "dtype": dtype.name}
    facts |= {"head_size": d, "page_size": page_size}
    op, named = "paged_attention", implementation
    if K * G > LISTED_ROWS:
        op, named = "shared_attention", without_triton(implementation)
    name = choose(op, named, **facts)
    if name == "xla":
        of_layer = tuple(lax.dynamic_index_in_dim(kv, layer, 1, keepdims=False) for kv in cache)
        one = functools.partial(reference.paged_attention, page_size=page_size)
        over_rows = jax.vmap(one, in_axes=(0, None, 0, 0))
        return jax.vmap(over_rows)(q_BxKxHxGxd, of_layer, keep_BxKxHxGxP, length_BxK)

    def rows(x: jax.Array) -> jax.Array:
        return x.swapaxes(1, 2).reshape(B, H, K * G, *x.shape[4:])

    on = _on_tpu if current_platform() == "tpu" else functools.partial(_on_gpu, by_triton=name == "triton")
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
    by_triton: bool,
) -> Part:
    bits_BxHxWxP = gpu.pack_rows(keep_BxHxRxP)
    if by_triton:
        parts = triton.attend(layer, q_BxHxRxd, *cache, bits_BxHxWxP[:, :, 0], length_BxR, page_size)
    else:
        listed = q_BxHxRxd.shape[2] <= LISTED_ROWS
        read = gpu.list_pages(bits_BxHxWxP[:, :, 0], interpret()) if listed else bits_BxHxWxP
        parts = gpu.attend(layer, q_BxHxRxd, *cache, read, length_BxR, page_size, interpret())
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
        count_BxH = jnp.sum(kept_BxHxP, -1, dtype=jnp.int32)
        # Sorted along with the pages, what rows see needs no gather, whose indices are padded to all lanes.
        page_BxHxP = lax.broadcasted_iota(jnp.int32, kept_BxHxP.shape, 2)
        along = page_BxHxP, *jnp.moveaxis(visible_BxHxRxP, 2, 0)
        _, page_BxHxP, *listed = lax.sort((~kept_BxHxP, *along), num_keys=1)
        listed_BxHxRxP = jnp.stack(listed, 2)
        # No copy if the cache was allocated in whole pages.
        pad = ((0, 0),) * 3 + ((0, P * page_size - S), (0, 0))
        k, v = (jnp.pad(kv, pad).reshape(*kv.shape[:3], P, page_size, d) for kv in cache)
        parts = tpu.attend_listed(layer, count_BxH, page_BxHxP, q_BxHxRxd, k, v, listed_BxHxRxP, interpret())
    else:
        limit_B = jnp.max(length_BxR, -1)
        parts = tpu.attend_whole(layer, limit_B, q_BxHxRxd, *cache, visible_BxHxRxP, page_size, interpret())
    mixed, top, total = parts
    return Part(mixed, top[..., 0], total[..., 0])
