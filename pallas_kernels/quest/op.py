"""Quest's operations, which pick an implementation: `reference` in XLA, or a kernel (`gpu`, `tpu`)."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import native
from pallas_kernels.cache import take_layer
from pallas_kernels.dispatch import choose, current_platform, interpret, no_gradient
from pallas_kernels.fold import fold_rows
from pallas_kernels.quest import gpu, reference, tpu

Select = Literal["head", "group"]
# XLA's CPU products treat the last few of what is not a multiple of their tiles apart.
LINE = 16


def page_bounds(
    k_HxNxd: jax.Array, valid_N: jax.Array, page_size: int, implementation: str | None = None
) -> jax.Array:
    """Returns the bounds [H, P, 2d] of consecutive pages of `page_size` keys; the last may be partial."""
    facts: dict[str, Any] = {"tokens": len(valid_N), "page_size": page_size, "dtype": k_HxNxd.dtype.name}
    name = choose("page_bounds", implementation, **facts)

    def bounds(k_HxNxd: jax.Array, valid_N: jax.Array) -> jax.Array:
        if name == "xla":
            return reference.page_bounds(k_HxNxd, valid_N, page_size)
        if name == "native":
            (H, _, d), P = k_HxNxd.shape, -(-len(valid_N) // page_size)
            out = jax.ShapeDtypeStruct((H, P, 2 * d), k_HxNxd.dtype)
            return native.call(
                "page_bounds", [out], k_HxNxd, valid_N, vmap_method="broadcast_all", page_size=page_size
            )[0]
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
    facts: dict[str, Any] = {"pages": count, "select": select, "dtype": dtype}
    name = choose("select_pages", implementation, **facts)

    def chosen(q: jax.Array, bounds: Any, used: Any, pages: jax.Array, layer: Any) -> tuple[jax.Array, ...]:
        if name == "xla":
            first = bounds[0] if layer is None else take_layer(bounds[0], layer)
            layer, rows = jnp.int32(0), _select_by_xla(select)
        else:
            first, layer = (bounds[0][None], jnp.int32(0)) if layer is None else (bounds[0], layer)
            rows = _select_on_tpu if current_platform() == "tpu" else _select_on_gpu(select)
            if name == "native":
                rows = _select_on_cpu(select)
        own = q, tuple(bounds[1:]), tuple(used), jnp.int32(pages)
        masks = fold_rows("select_pages", rows)(jnp.int32(layer), first, own)
        return tuple(jnp.broadcast_to(mask, (*q.shape[:2], mask.shape[-1])) for mask in masks)

    return no_gradient("select_pages", chosen)(q_HxGxd, tuple(bounds), tuple(used), pages, layer)


# A row's own pages are scored by the very product that scores the shared ones, of the same rows and blocks:
# in products of other shapes sums have another order, and pages of equal bounds would not tie.  So the own
# pages of all K rows stand in one line, each row meets all of them, and all but its own are left out.


def _in_line(
    bounds_BxKxHxNx2d: jax.Array, used_BxKxN: jax.Array, pages: int = 1, shared: int = 0
) -> jax.Array:
    """Returns the own pages of all rows [B, H, M, 2d], filled up until M and `shared` are whole `pages`.

    Bounds of pages that are not in use, which are infinite, become 0.
    """
    B, K, H, N, width = bounds_BxKxHxNx2d.shape
    finite = jnp.where(used_BxKxN[:, :, None, :, None], bounds_BxKxHxNx2d, 0)
    line = finite.swapaxes(1, 2).reshape(B, H, K * N, width)
    return jnp.pad(line, ((0, 0), (0, 0), (0, -(shared + K * N) % pages), (0, 0)))


def _own_of_line(score_BxHxKxGxM: jax.Array, N: int) -> jax.Array:
    """Returns each row's scores [B, H, K, G, N] of its own pages."""
    B, H, K, G, _ = score_BxHxKxGxM.shape
    score_BxHxKxGxKxN = score_BxHxKxGxM[..., : K * N].reshape(B, H, K, G, K, N)
    mine_Kx1xKx1 = jnp.eye(K, dtype=bool)[:, None, :, None]
    return jnp.sum(jnp.where(mine_Kx1xKx1, score_BxHxKxGxKxN, 0.0), 4)


def _select_by_xla(select: Select) -> Any:
    def rows(layer: jax.Array, bounds_BxHxPx2d: jax.Array, own: Any) -> tuple[jax.Array, ...]:
        q_BxKxHxGxd, own_bounds, used, pages_BxK = own
        P = used[0].shape[-1]
        # An unused shared page may be infinite to one row alone; `where` below leaves its score out.
        line = [bounds_BxHxPx2d]
        if own_bounds:
            line.append(_in_line(own_bounds[0], used[1], LINE, P).astype(bounds_BxHxPx2d.dtype))
        signed_BxKxHxGx2d = reference.signed(q_BxKxHxGxd)
        score_BxHxKxGxM = jnp.einsum(
            "bkhgc,bhpc->bhkgp",
            signed_BxKxHxGx2d,
            jnp.concatenate(line, 2),
            preferred_element_type=jnp.float32,
        )
        scores = [score_BxHxKxGxM[..., :P]]
        if own_bounds:
            scores.append(_own_of_line(score_BxHxKxGxM[..., P:], used[1].shape[-1]))
        return reference.select(scores, used, pages_BxK, select)

    return rows


def _select_on_cpu(select: Select) -> Any:
    def rows(layer: jax.Array, bounds_BxLxHxPx2d: jax.Array, own: Any) -> tuple[jax.Array, ...]:
        q_BxKxHxGxd, own_bounds, used, pages_BxK = own
        B, K, H, G, d = q_BxKxHxGxd.shape
        # The kernel wants two parts: without a second, it gets one page that is not in use.
        mine = own_bounds[0] if own_bounds else jnp.zeros((B, K, H, 1, 2 * d), bounds_BxLxHxPx2d.dtype)
        mine_used = used[1] if own_bounds else jnp.zeros((B, K, 1), bool)
        out = [native.masks(B, K, H, G, used[0].shape[-1]), native.masks(B, K, H, G, mine_used.shape[-1])]
        args: Any = q_BxKxHxGxd.astype(jnp.float32), bounds_BxLxHxPx2d, mine.astype(bounds_BxLxHxPx2d.dtype)
        args += used[0], mine_used, pages_BxK
        keep = native.call("select_pages", out, layer, *args, of_group=select == "group")
        return tuple(keep[: len(used)])

    return rows


def _select_on_gpu(select: Select) -> Any:
    def fold(layer: jax.Array, bounds_BxLxHxPx2d: jax.Array, own: Any) -> tuple[jax.Array, ...]:
        q_BxKxHxGxd, own_bounds, used, pages_BxK = own
        B, K, H, G, d = q_BxKxHxGxd.shape
        available_BxK = sum(jnp.sum(mask, -1) for mask in used)
        skip_B = jnp.all(pages_BxK >= available_BxK, -1).astype(jnp.int32)
        q_BxHxRx2d = reference.signed(q_BxKxHxGxd).swapaxes(1, 2).reshape(B, H, K * G, 2 * d)
        score = gpu.page_scores(layer, skip_B, q_BxHxRx2d, bounds_BxLxHxPx2d, interpret())
        scores = [score.reshape(B, H, K, G, -1)]
        for bounds, mask in zip(own_bounds, used[1:], strict=True):
            line = _in_line(bounds, mask)[:, None]
            none_B = jnp.zeros_like(skip_B)
            own_score = gpu.page_scores(
                jnp.int32(0), none_B, q_BxHxRx2d, line, interpret(), name="own_page_scores"
            )
            scores.append(_own_of_line(own_score.reshape(B, H, K, G, -1), mask.shape[-1]))
        if select == "group":
            scores = [jnp.sum(score, 3, keepdims=True) for score in scores]
        return gpu.select(tuple(scores), used, pages_BxK, interpret())

    return fold


def _select_on_tpu(layer: jax.Array, bounds_BxLxHxPx2d: jax.Array, own: Any) -> tuple[jax.Array, ...]:
    q_BxKxHxGxd, own_bounds, used, pages_BxK = own
    B, K, H, G, d = q_BxKxHxGxd.shape
    # The rows are known only here, so only here can too many of them be refused.
    choose("select_pages", "pallas", scores_of_a_head=K * G * used[0].shape[-1])
    q_BxHxRx2d = reference.signed(q_BxKxHxGxd).swapaxes(1, 2).reshape(B, H, K * G, 2 * d)
    # The kernel wants two parts: without a second, it gets one page that is not in use.
    own_score, own_used = jnp.zeros((B, H, K, G, 1)), jnp.zeros((B, K, 1), bool)
    if own_bounds:
        block, own_used = tpu.score_block(used[0].shape[-1]), used[1]
        line = tpu.page_scores(q_BxHxRx2d, _in_line(own_bounds[0], own_used, block), block, interpret())
        own_score = _own_of_line(line.reshape(B, H, K, G, -1), own_used.shape[-1])
    masks = tpu.select_pages(
        layer,
        q_BxHxRx2d,
        bounds_BxLxHxPx2d,
        own_score.reshape(B, H, K * G, -1),
        (jnp.repeat(used[0], G, 1), jnp.repeat(own_used, G, 1)),
        jnp.repeat(pages_BxK, G, 1),
        interpret(),
    )
    return tuple(mask.reshape(B, H, K, G, -1).swapaxes(1, 2) for mask in masks[: len(used)])
