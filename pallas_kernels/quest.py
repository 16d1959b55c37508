"""Quest's page bounds, page scores and choice of pages (arXiv 2406.10774).

The bounds of a page are one vector of 2d numbers: the elementwise largest of its keys, then the smallest.
An empty page has bounds (-inf, inf).
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import quest_gpu, quest_tpu
from pallas_kernels.cache import take_layer
from pallas_kernels.dispatch import choose, current_platform, interpret, no_gradient
from pallas_kernels.fold import fold_rows
from pallas_kernels.topk import at_least_kth

Select = Literal["head", "group"]


def page_bounds(
    k_HxNxd: jax.Array, valid_N: jax.Array, page_size: int, implementation: str | None = None
) -> jax.Array:
    """Bounds [H, P, 2d] of consecutive pages of `page_size` keys; the last page may be partial."""
    facts: dict[str, Any] = {"tokens": len(valid_N), "page_size": page_size, "dtype": k_HxNxd.dtype.name}
    name = choose("page_bounds", implementation, **facts)

    def bounds(k_HxNxd: jax.Array, valid_N: jax.Array) -> jax.Array:
        if name == "xla":
            return _page_bounds(k_HxNxd, valid_N, page_size)
        kernels = quest_tpu if current_platform() == "tpu" else quest_gpu
        return kernels.page_bounds(k_HxNxd, valid_N, page_size, interpret())

    return no_gradient("page_bounds", bounds)(k_HxNxd, valid_N)


def _page_bounds(k_HxNxd: jax.Array, valid_N: jax.Array, page_size: int) -> jax.Array:
    H, N, d = k_HxNxd.shape
    P = -(-N // page_size)
    pad = (0, P * page_size - N)
    k_HxPxpxd = jnp.pad(k_HxNxd, ((0, 0), pad, (0, 0))).reshape(H, P, page_size, d)
    valid_Pxpx1 = jnp.pad(valid_N, pad).reshape(P, page_size, 1)
    high = jnp.max(jnp.where(valid_Pxpx1, k_HxPxpxd, -jnp.inf), 2)
    low = jnp.min(jnp.where(valid_Pxpx1, k_HxPxpxd, jnp.inf), 2)
    return jnp.concatenate([high, low], -1)


def extend_bounds(bounds_HxPx2d: jax.Array, k_Hxd: jax.Array, page_P: jax.Array) -> jax.Array:
    """The bounds once a key is added to the pages marked in the mask `page_P`.

    XLA everywhere: it is elementwise over a schedule's few own pages (kilobytes), and XLA fuses it with the
    write into the cache around it, where a kernel would be one more launch.
    """

    def extend(bounds_HxPx2d: jax.Array, k_Hxd: jax.Array, page_P: jax.Array) -> jax.Array:
        high, low = jnp.split(bounds_HxPx2d, 2, -1)
        k_Hx1xd = k_Hxd[:, None]
        extended = jnp.concatenate([jnp.maximum(high, k_Hx1xd), jnp.minimum(low, k_Hx1xd)], -1)
        return jnp.where(page_P[:, None], extended, bounds_HxPx2d)

    return no_gradient("extend_bounds", extend)(bounds_HxPx2d, k_Hxd, page_P)


def page_scores(q_HxGxd: jax.Array, bounds_HxPx2d: jax.Array, used_P: jax.Array) -> jax.Array:
    """Upper bound of q.k over each page, `sum_d max(q_d high_d, q_d low_d)`: [H, G, P], float32.

    Pages not in the mask `used_P` score -inf.  One matrix product: the positive part of q meets the highs,
    the negative part the lows.
    """
    finite = jnp.where(used_P[:, None], bounds_HxPx2d, 0)
    score_HxGxP = jnp.einsum("hgc,hpc->hgp", signed(q_HxGxd), finite, preferred_element_type=jnp.float32)
    return jnp.where(used_P, score_HxGxP, -jnp.inf)


def signed(q: jax.Array) -> jax.Array:
    """The positive parts of q [..., d], then the negative ones: [..., 2d]."""
    return jnp.concatenate([jnp.maximum(q, 0), jnp.minimum(q, 0)], -1)


def select_pages(
    q_HxGxd: jax.Array,
    bounds: Sequence[jax.Array],
    used: Sequence[jax.Array],
    pages: jax.Array,
    *,
    layer: jax.Array | None = None,
    select: Select = "head",
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """Masks [H, G, P] of the pages whose score is at least the `pages`-th highest, for each query head.

    Pages come in one or two parts with bounds [H, P, 2d] and masks [P] of those in use, and are ranked
    together. The first part may be shared: vmapped over rows with those bounds unbatched, each is read once
    for all rows. With `layer` it has a leading axis of layers, of which one is read in place (slicing it
    would copy it).

    `select="group"` is **not** Quest and changes outputs: the heads of a group take the same pages, those of
    the highest summed score, so that fewer bytes are read.
    """
    if select not in ("head", "group"):
        raise ValueError(f"select_pages: select is {select!r} and must be 'head' or 'group'")
    count = sum(mask.shape[-1] for mask in used)
    dtype = jnp.promote_types(q_HxGxd.dtype, bounds[0].dtype).name
    name = choose("select_pages", implementation, pages=count, select=select, dtype=dtype)

    def chosen(q: jax.Array, bounds: Any, used: Any, pages: jax.Array, layer: Any) -> tuple[jax.Array, ...]:
        if name == "xla":
            first = bounds[0] if layer is None else take_layer(bounds[0], layer)
            return _select_pages(q, (first, *bounds[1:]), used, pages, select)
        first, layer = (bounds[0][None], jnp.int32(0)) if layer is None else (bounds[0], layer)
        fold = fold_rows(
            "select_pages", _select_on_tpu if current_platform() == "tpu" else _select_on_gpu(select)
        )
        own = q, tuple(bounds[1:]), tuple(used), jnp.int32(pages)
        masks = fold(jnp.int32(layer), first, own)
        return tuple(jnp.broadcast_to(mask, (*q.shape[:2], mask.shape[-1])) for mask in masks)

    return no_gradient("select_pages", chosen)(q_HxGxd, tuple(bounds), tuple(used), pages, layer)


def _select_pages(
    q_HxGxd: jax.Array, bounds: Sequence[jax.Array], used: Sequence[jax.Array], pages: jax.Array, select: str
) -> tuple[jax.Array, ...]:
    parts = [page_scores(q_HxGxd, b, u) for b, u in zip(bounds, used, strict=True)]
    score = jnp.concatenate(parts, -1)
    if select == "group":
        score = jnp.broadcast_to(jnp.sum(score, 1, keepdims=True), score.shape)
    keep = at_least_kth(score, jnp.broadcast_to(pages, score.shape[:-1]))
    ends = [sum(part.shape[-1] for part in parts[: i + 1]) for i in range(len(parts) - 1)]
    return tuple(jnp.split(keep, ends, -1))


def _own_scores(
    q_BxKxHxGxd: jax.Array, bounds: Sequence[jax.Array], used: Sequence[jax.Array]
) -> list[jax.Array]:
    """Scores [B, H, K, G, N] of the pages that each row has for itself: few, so XLA's."""
    score = jax.vmap(jax.vmap(page_scores))
    return [score(q_BxKxHxGxd, b, u).swapaxes(1, 2) for b, u in zip(bounds, used, strict=True)]


def _select_on_gpu(select: Select) -> Any:
    def fold(layer: jax.Array, bounds_BxLxHxPx2d: jax.Array, own: Any) -> tuple[jax.Array, ...]:
        q_BxKxHxGxd, own_bounds, used, pages_BxK = own
        B, K, H, G, d = q_BxKxHxGxd.shape
        available_BxK = sum(jnp.sum(mask, -1) for mask in used)
        skip_B = jnp.all(pages_BxK >= available_BxK, -1).astype(jnp.int32)
        q_BxHxRx2d = signed(q_BxKxHxGxd).swapaxes(1, 2).reshape(B, H, K * G, 2 * d)
        score = quest_gpu.page_scores(layer, skip_B, q_BxHxRx2d, bounds_BxLxHxPx2d, interpret())
        scores = [score.reshape(B, H, K, G, -1), *_own_scores(q_BxKxHxGxd, own_bounds, used[1:])]
        if select == "group":
            scores = [jnp.sum(score, 3, keepdims=True) for score in scores]
        return quest_gpu.select(tuple(scores), used, pages_BxK, interpret())

    return fold


def _select_on_tpu(layer: jax.Array, bounds_BxLxHxPx2d: jax.Array, own: Any) -> tuple[jax.Array, ...]:
    q_BxKxHxGxd, own_bounds, used, pages_BxK = own
    B, K, H, G, d = q_BxKxHxGxd.shape
    # Once more, for only here are the rows known.
    choose("select_pages", "pallas", scores_of_a_head=K * G * used[0].shape[-1])
    own_scores = _own_scores(q_BxKxHxGxd, own_bounds, used[1:])
    # The kernel wants two parts: without a second, one page that is not in use.
    own_score = own_scores[0] if own_scores else jnp.zeros((B, H, K, G, 1))
    own_used = used[1] if own_scores else jnp.zeros((B, K, 1), bool)
    masks = quest_tpu.select_pages(
        layer,
        signed(q_BxKxHxGxd).swapaxes(1, 2).reshape(B, H, K * G, 2 * d),
        bounds_BxLxHxPx2d,
        own_score.reshape(B, H, K * G, -1),
        (jnp.repeat(used[0], G, 1), jnp.repeat(own_used, G, 1)),
        jnp.repeat(pages_BxK, G, 1),
        interpret(),
    )
    return tuple(mask.reshape(B, H, K, G, -1).swapaxes(1, 2) for mask in masks[: len(used)])
