"""Quest's operations, which pick an implementation: `reference` in XLA, or a kernel (`gpu`, `tpu`)."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.cache import take_layer
from pallas_kernels.dispatch import choose, current_platform, interpret, no_gradient
from pallas_kernels.fold import fold_rows
from pallas_kernels.quest import gpu, reference, tpu

Select = Literal["head", "group"]


def page_bounds(
    k_HxNxd: jax.Array, valid_N: jax.Array, page_size: int, implementation: str | None = None
) -> jax.Array:
    """Returns the bounds [H, P, 2d] of consecutive pages of `page_size` keys; the last may be partial."""
    facts: dict[str, Any] = {"tokens": len(valid_N), "page_size": page_size, "dtype": k_HxNxd.dtype.name}
    name = choose("page_bounds", implementation, **facts)

    def bounds(k_HxNxd: jax.Array, valid_N: jax.Array) -> jax.Array:
        if name == "xla":
            return reference.page_bounds(k_HxNxd, valid_N, page_size)
        kernels = tpu if current_platform() == "tpu" else gpu
        return kernels.page_bounds(k_HxNxd, valid_N, page_size, interpret())

    return no_gradient("page_bounds", bounds)(k_HxNxd, valid_N)


def extend_bounds(bounds_HxPx2d: jax.Array, k_Hxd: jax.Array, page_P: jax.Array) -> jax.Array:
    """Returns the bounds once a key is added to the pages marked in the mask `page_P`.

    This is XLA's everywhere: it is elementwise over a schedule's few own pages (kilobytes), and XLA fuses it
    with the write into the cache around it, where a kernel would be one more launch.
    """
    return no_gradient("extend_bounds", reference.extend_bounds)(bounds_HxPx2d, k_Hxd, page_P)


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
    """Returns each query head's masks [H, G, P] of the pages that score at least the `pages`-th highest.

    Pages come in one or two parts with bounds [H, P, 2d] and masks [P] of those in use, and are ranked
    together.  The first part may be shared: if rows are vmapped with those bounds unbatched, each bound is
    read once for all rows.  With `layer` it has a leading axis of layers, of which one is read in place
    (slicing it would copy it).

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
            return reference.select_pages(q, (first, *bounds[1:]), used, pages, select)
        first, layer = (bounds[0][None], jnp.int32(0)) if layer is None else (bounds[0], layer)
        fold = fold_rows(
            "select_pages", _select_on_tpu if current_platform() == "tpu" else _select_on_gpu(select)
        )
        own = q, tuple(bounds[1:]), tuple(used), jnp.int32(pages)
        masks = fold(jnp.int32(layer), first, own)
        return tuple(jnp.broadcast_to(mask, (*q.shape[:2], mask.shape[-1])) for mask in masks)

    return no_gradient("select_pages", chosen)(q_HxGxd, tuple(bounds), tuple(used), pages, layer)


def _own_scores(
    q_BxKxHxGxd: jax.Array, bounds: Sequence[jax.Array], used: Sequence[jax.Array]
) -> list[jax.Array]:
    """Returns scores [B, H, K, G, N] of the pages that each row has for itself.

    They are few, so XLA computes them.
    """
    score = jax.vmap(jax.vmap(reference.page_scores))
    return [score(q_BxKxHxGxd, b, u).swapaxes(1, 2) for b, u in zip(bounds, used, strict=True)]


def _select_on_gpu(select: Select) -> Any:
    def fold(layer: jax.Array, bounds_BxLxHxPx2d: jax.Array, own: Any) -> tuple[jax.Array, ...]:
        q_BxKxHxGxd, own_bounds, used, pages_BxK = own
        B, K, H, G, d = q_BxKxHxGxd.shape
        available_BxK = sum(jnp.sum(mask, -1) for mask in used)
        skip_B = jnp.all(pages_BxK >= available_BxK, -1).astype(jnp.int32)
        q_BxHxRx2d = reference.signed(q_BxKxHxGxd).swapaxes(1, 2).reshape(B, H, K * G, 2 * d)
        score = gpu.page_scores(layer, skip_B, q_BxHxRx2d, bounds_BxLxHxPx2d, interpret())
        scores = [score.reshape(B, H, K, G, -1), *_own_scores(q_BxKxHxGxd, own_bounds, used[1:])]
        if select == "group":
            scores = [jnp.sum(score, 3, keepdims=True) for score in scores]
        return gpu.select(tuple(scores), used, pages_BxK, interpret())

    return fold


def _select_on_tpu(layer: jax.Array, bounds_BxLxHxPx2d: jax.Array, own: Any) -> tuple[jax.Array, ...]:
    q_BxKxHxGxd, own_bounds, used, pages_BxK = own
    B, K, H, G, d = q_BxKxHxGxd.shape
    # The rows are known only here, so only here can too many of them be refused.
    choose("select_pages", "pallas", scores_of_a_head=K * G * used[0].shape[-1])
    own_scores = _own_scores(q_BxKxHxGxd, own_bounds, used[1:])
    # The kernel wants two parts: without a second, it gets one page that is not in use.
    own_score = own_scores[0] if own_scores else jnp.zeros((B, H, K, G, 1))
    own_used = used[1] if own_scores else jnp.zeros((B, K, 1), bool)
    masks = tpu.select_pages(
        layer,
        reference.signed(q_BxKxHxGxd).swapaxes(1, 2).reshape(B, H, K * G, 2 * d),
        bounds_BxLxHxPx2d,
        own_score.reshape(B, H, K * G, -1),
        (jnp.repeat(used[0], G, 1), jnp.repeat(own_used, G, 1)),
        jnp.repeat(pages_BxK, G, 1),
        interpret(),
    )
    return tuple(mask.reshape(B, H, K, G, -1).swapaxes(1, 2) for mask in masks[: len(used)])
