"""TPU kernels of Quest (Pallas, lowered through Mosaic): page bounds; page scores and exact selection as one.

There are `B` sequences, `K` rows of each that share its pages, and `R = K * G` query rows of one key/value
head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.products import dot_on_tpu
from pallas_kernels.topk import is_nan, kth_largest, ordered_bits

# These sizes are untested on a TPU.  Blocks of about half a megabyte hide the latency of a copy; rows come in
# eights.
BOUNDS_PAGES, BOUNDS_BYTES, SCORE_PAGES = 64, 2 << 20, 512


def page_bounds(k_HxNxd: jax.Array, valid_N: jax.Array, page_size: int, interpret: Any = False) -> jax.Array:
    """Does what `reference.page_bounds` does, for one sequence (vmap adds grid axes).

    Pages hold a multiple of 8 keys.
    """
    H, N, d = k_HxNxd.shape
    P = pl.cdiv(N, page_size)
    # Each key is in the block and, in float32, beside it.
    fitting = BOUNDS_BYTES // (page_size * d * (k_HxNxd.dtype.itemsize + 4)) // 8 * 8
    pages = min(BOUNDS_PAGES, max(fitting, 8), pl.cdiv(P, 8) * 8)
    # A page a row: a token a row would take 512 bytes of a TPU's tiles.
    valid_Pxp = jnp.pad(valid_N.astype(jnp.int32), (0, P * page_size - N)).reshape(P, page_size)
    return pl.pallas_call(
        functools.partial(_bounds_kernel, page_size=page_size, P=P),
        out_shape=jax.ShapeDtypeStruct((H, P, 2 * d), k_HxNxd.dtype),
        grid=(H, pl.cdiv(P, pages)),
        in_specs=[
            pl.BlockSpec((None, pages * page_size, d), lambda h, block: (h, block, 0)),
            pl.BlockSpec((pages, page_size), lambda h, block: (block, 0)),
        ],
        out_specs=pl.BlockSpec((None, pages, 2 * d), lambda h, block: (h, block, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="page_bounds",
    )(k_HxNxd, valid_Pxp)


def _bounds_kernel(k_ref: Any, valid_ref: Any, bounds_ref: Any, *, page_size: int, P: int) -> None:
    (_, d), (pages, _) = k_ref.shape, bounds_ref.shape
    page = pl.program_id(1) * pages + jax.lax.broadcasted_iota(jnp.int32, (pages, page_size), 0)
    valid = jnp.where(page < P, valid_ref[...], 0)[:, :, None] != 0
    k = k_ref[...].astype(jnp.float32).reshape(pages, page_size, d)
    # The hardware's maximum and minimum drop NaN; a page with one must keep it.
    spoilt = jnp.max((valid & is_nan(k)).astype(jnp.int32), 1) != 0
    high = jnp.where(spoilt, jnp.nan, jnp.max(jnp.where(valid, k, -jnp.inf), 1))
    low = jnp.where(spoilt, jnp.nan, jnp.min(jnp.where(valid, k, jnp.inf), 1))
    bounds_ref[:, :d] = high.astype(bounds_ref.dtype)
    bounds_ref[:, d:] = low.astype(bounds_ref.dtype)


def score_block(P: int) -> int:
    """Returns how many of P pages are scored by one product."""
    return min(SCORE_PAGES, pl.cdiv(P, 128) * 128)


def page_scores(
    q_BxHxRx2d: jax.Array, bounds_BxHxNx2d: jax.Array, block: int, interpret: Any = False
) -> jax.Array:
    """Returns scores [B, H, R, N] of pages by products of `block` pages, which divides N.

    They are the products of `select_pages`, for pages that are not shared.
    """
    (B, H, R, width), N = q_BxHxRx2d.shape, bounds_BxHxNx2d.shape[2]

    def kernel(q_ref: Any, bounds_ref: Any, score_ref: Any) -> None:
        score_ref[...] = dot_on_tpu(q_ref[...], bounds_ref[...])

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((B, H, R, N), jnp.float32),
        grid=(B, H, N // block),
        in_specs=[
            pl.BlockSpec((None, None, R, width), lambda b, h, p: (b, h, 0, 0)),
            pl.BlockSpec((None, None, block, width), lambda b, h, p: (b, h, p, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, R, block), lambda b, h, p: (b, h, 0, p)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=interpret,
        name="own_page_scores",
    )(q_BxHxRx2d, bounds_BxHxNx2d)


def select_pages(
    layer: jax.Array,
    q_BxHxRx2d: jax.Array,
    bounds_BxLxHxPx2d: jax.Array,
    own_score_BxHxRxN: jax.Array,
    used: tuple[jax.Array, jax.Array],
    pages_BxR: jax.Array,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns masks [B, H, R, P] and [B, H, R, N] of each row's `pages` best of the pages in use.

    `used` are the masks [B, R, P] and [B, R, N] of these.  Scores stay on the chip.  Where every row takes
    all its used pages, the bounds are not read.
    """
    (B, H, R, width), P, N = q_BxHxRx2d.shape, bounds_BxLxHxPx2d.shape[3], own_score_BxHxRxN.shape[3]
    block = score_block(P)
    lanes = pl.cdiv(P, block) * block
    used_BxRxM, used_BxRxN = (mask.astype(jnp.int32) for mask in used)
    used_BxRxM = jnp.pad(used_BxRxM, ((0, 0), (0, 0), (0, lanes - P)))
    available = jnp.sum(used_BxRxM, -1) + jnp.sum(used_BxRxN, -1)
    skip_B = jnp.all(pages_BxR >= available, -1).astype(jnp.int32)

    def rows(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, R, size), lambda b, h, p, *_: (b, 0, 0))

    def head_rows(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, R, size), lambda b, h, p, *_: (b, h, 0, 0))

    def bounds_block(b: Any, h: Any, p: Any, layer: Any, skip: Any) -> tuple[Any, ...]:
        return b, layer[0], h, p * (1 - skip[b]), 0

    keep_BxHxRxM, keep_BxHxRxN = pl.pallas_call(
        functools.partial(_select_kernel, P=P),
        out_shape=[jax.ShapeDtypeStruct((B, H, R, size), jnp.int32) for size in (lanes, N)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, H, lanes // block),
            in_specs=[
                head_rows(width),
                pl.BlockSpec((None, None, None, block, width), bounds_block),
                head_rows(N),
                rows(lanes),
                rows(N),
                rows(1),
            ],
            out_specs=[head_rows(lanes), head_rows(N)],
            scratch_shapes=[pltpu.VMEM((lanes // block, R, block), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="select_pages",
    )(
        layer.reshape(1),
        skip_B,
        q_BxHxRx2d,
        bounds_BxLxHxPx2d,
        own_score_BxHxRxN,
        used_BxRxM,
        used_BxRxN,
        pages_BxR[..., None],
    )
    return keep_BxHxRxM[..., :P] != 0, keep_BxHxRxN != 0


def _select_kernel(
    layer_ref: Any,
    skip_ref: Any,
    q_ref: Any,
    bounds_ref: Any,
    own_ref: Any,
    used_ref: Any,
    own_used_ref: Any,
    pages_ref: Any,
    keep_ref: Any,
    own_keep_ref: Any,
    score_ref: Any,
    *,
    P: int,
) -> None:
    b, step, steps = pl.program_id(0), pl.program_id(2), pl.num_programs(2)

    @pl.when(skip_ref[b] == 0)
    def _() -> None:
        score_ref[step] = dot_on_tpu(q_ref[...], bounds_ref[...])

    @pl.when(step == steps - 1)
    def _() -> None:
        blocks, _, block = score_ref.shape
        used = [used_ref[:, i * block : (i + 1) * block] for i in range(blocks)] + [own_used_ref[...]]
        scores = [score_ref[i] for i in range(blocks)] + [own_ref[...]]
        available = sum(jnp.sum(mask, -1, keepdims=True) for mask in used)
        every = pages_ref[...] >= available
        bits = []
        for i, (mask, score) in enumerate(zip(used, scores, strict=True)):
            ordered = ordered_bits(jnp.where(mask != 0, jnp.where(every, 0.0, score), -jnp.inf))
            if i < blocks:  # lanes past the last page lie below every number
                lane = i * block + jax.lax.broadcasted_iota(jnp.int32, ordered.shape, 1)
                ordered = jnp.where(lane < P, ordered, jnp.iinfo(jnp.int32).min)
            bits.append(ordered)
        threshold = kth_largest(bits, pages_ref[...])
        for i, ordered in enumerate(bits[:-1]):
            keep_ref[:, i * block : (i + 1) * block] = (ordered >= threshold).astype(jnp.int32)
        own_keep_ref[...] = (bits[-1] >= threshold).astype(jnp.int32)
