"""GPU kernels of Quest (Pallas, lowered through Triton): page bounds, page scores, exact selection.

There are `B` sequences, `K` rows of each that share its pages, and `R = K * G` query rows of one key/value
head.  Blocks are powers of two and out-of-range lanes are masked, so any number of pages, rows and channels
will do.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.pallas_triton import plgpu
from pallas_kernels.products import dot_on_gpu
from pallas_kernels.topk import is_nan, kth_largest, ordered_bits

# These sizes are untested on a GPU.  They follow byte counts and what Triton makes of them for sm_90
# (registers, spills).  Scoring moves bytes and little else: 64 pages of 2 x 128 bfloat16 are 32 KB, 256 bytes
# in flight a thread, and give a single row at 32k tokens 256 programs of 8 heads.  Twice the width spills.
BOUNDS_TOKENS = 64  # keys reduced by one program
SCORE_PAGES, SCORE_ROWS = {2: 64, 4: 32}, 64  # pages by the size of a number
# A program holds its rows' scores in registers while it bisects: 16 of a thread's 255 for up to 8,192 pages.
# Short rows share a program; long ones do not, so that one sequence's heads keep many processors busy.
SELECT_LANES, LANES_PER_WARP, MAX_WARPS = 2048, 512, 16


def page_bounds(k_HxNxd: jax.Array, valid_N: jax.Array, page_size: int, interpret: bool = False) -> jax.Array:
    """Does what `reference.page_bounds` does, for one sequence (vmap adds grid axes)."""
    H, N, d = k_HxNxd.shape
    P = pl.cdiv(N, page_size)
    pages = max(1, BOUNDS_TOKENS // pl.next_power_of_2(page_size))
    return pl.pallas_call(
        functools.partial(_bounds_kernel, page_size=page_size, pages=pages),
        out_shape=jax.ShapeDtypeStruct((H, P, 2 * d), k_HxNxd.dtype),
        grid=(pl.cdiv(P, pages), H),
        in_specs=[
            pl.BlockSpec((None, N, d), lambda block, h: (h, 0, 0)),
            pl.BlockSpec((N,), lambda block, h: (0,)),
        ],
        out_specs=pl.BlockSpec((None, P, 2 * d), lambda block, h: (h, 0, 0)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="page_bounds",
    )(k_HxNxd, valid_N.astype(jnp.int8))


def _bounds_kernel(k_ref: Any, valid_ref: Any, bounds_ref: Any, *, page_size: int, pages: int) -> None:
    N, d = k_ref.shape
    page = pl.program_id(0) * pages + jnp.arange(pages)
    slot = jnp.arange(pl.next_power_of_2(page_size))
    column = jnp.arange(pl.next_power_of_2(d))
    token = page[:, None] * page_size + slot
    inside = (slot < page_size) & (token < N)
    valid = plgpu.load(valid_ref.at[token], mask=inside, other=0) != 0
    here, column_here = valid[:, :, None], (column < d)[None, None, :]
    address = token[:, :, None], column[None, None, :]
    k = plgpu.load(k_ref.at[address], mask=here & column_here, other=0).astype(jnp.float32)
    high, low = reduce_page(k, here)
    store = (page < pl.cdiv(N, page_size))[:, None] & (column < d)
    for offset, bound in ((0, high), (d, low)):
        at = bounds_ref.at[page[:, None], offset + column[None, :]]
        plgpu.store(at, bound.astype(bounds_ref.dtype), mask=store)


def reduce_page(k_PxNxd: jax.Array, valid_PxNx1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the largest and the smallest of each page's valid keys, [P, d] each; TPU kernels use it too."""
    # The hardware's maximum and minimum drop NaN; a page with one must keep it.
    spoilt = jnp.max((valid_PxNx1 & is_nan(k_PxNxd)).astype(jnp.int32), 1) != 0
    high = jnp.max(jnp.where(valid_PxNx1, k_PxNxd, -jnp.inf), 1)
    low = jnp.min(jnp.where(valid_PxNx1, k_PxNxd, jnp.inf), 1)
    return jnp.where(spoilt, jnp.nan, high), jnp.where(spoilt, jnp.nan, low)


def page_scores(
    layer: jax.Array,
    skip_B: jax.Array,
    q_BxHxRx2d: jax.Array,
    bounds_BxLxHxPx2d: jax.Array,
    interpret: bool = False,
    name: str = "page_scores",
) -> jax.Array:
    """Returns scores [B, H, R, P] of every page of `layer` by queries that are `reference.signed`.

    Nothing is read or written where `skip_B` is not 0.
    """
    B, H, R, _ = q_BxHxRx2d.shape
    _, L, _, P, width = bounds_BxLxHxPx2d.shape
    rows = min(max(16, pl.next_power_of_2(R)), SCORE_ROWS)  # a matrix product has 16 rows at least
    pages = SCORE_PAGES[bounds_BxLxHxPx2d.dtype.itemsize]
    return pl.pallas_call(
        functools.partial(_scores_kernel, rows=rows, pages=pages, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((B, H, R, P), jnp.float32),
        # Neighbours in the first grid axis run together: tiles of rows that read the same pages.
        grid=(pl.cdiv(R, rows), pl.cdiv(P, pages), H, B),
        in_specs=[
            pl.BlockSpec((1,), lambda r, p, h, b: (0,)),
            pl.BlockSpec((1,), lambda r, p, h, b: (b,)),
            pl.BlockSpec((None, None, R, width), lambda r, p, h, b: (b, h, 0, 0)),
            pl.BlockSpec((None, L, None, P, width), lambda r, p, h, b: (b, 0, h, 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, R, P), lambda r, p, h, b: (b, h, 0, 0)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=name,
    )(layer.reshape(1), skip_B, q_BxHxRx2d, bounds_BxLxHxPx2d)


def _scores_kernel(
    layer_ref: Any,
    skip_ref: Any,
    q_ref: Any,
    bounds_ref: Any,
    score_ref: Any,
    *,
    rows: int,
    pages: int,
    interpret: bool,
) -> None:
    (R, width), P = q_ref.shape, score_ref.shape[1]
    row = pl.program_id(0) * rows + jnp.arange(rows)[:, None]
    page = pl.program_id(1) * pages + jnp.arange(pages)
    column = jnp.arange(max(16, pl.next_power_of_2(width)))[None, :]

    @pl.when(skip_ref[0] == 0)
    def _() -> None:
        q = plgpu.load(q_ref.at[row, column], mask=(row < R) & (column < width), other=0)
        at, inside = (layer_ref[0], page[:, None], column), (page < P)[:, None] & (column < width)
        bounds = plgpu.load(bounds_ref.at[at], mask=inside, other=0)
        operand = jnp.promote_types(q.dtype, bounds.dtype)
        score = dot_on_gpu(q.astype(operand), bounds.astype(operand).T, interpret)
        plgpu.store(score_ref.at[row, page[None, :]], score, mask=(row < R) & (page < P))


def select(
    scores: tuple[jax.Array, ...],
    used: tuple[jax.Array, ...],
    pages_BxK: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Returns masks [B, K, H, G, P] of each row's `pages` best of the used pages of all parts.

    A part is some pages with scores [B, H, K, G, P] and the mask [B, K, P] of those in use.  Rows that take
    all their used pages get them without a look at the scores, which `page_scores` may have skipped.
    """
    B, H, K, G, _ = scores[0].shape
    lanes = [pl.next_power_of_2(score.shape[-1]) for score in scores]
    rows = pl.next_power_of_2(G) if max(lanes) * pl.next_power_of_2(G) <= SELECT_LANES else 1
    warps = min(MAX_WARPS, max(1, rows * max(lanes) // LANES_PER_WARP))
    specs = [
        [
            pl.BlockSpec((None, None, None, G, P), lambda g, h, k, b: (b, h, k, 0, 0)),
            pl.BlockSpec((None, None, P), lambda g, h, k, b: (b, k, 0)),
            pl.BlockSpec((None, None, None, G, P), lambda g, h, k, b: (b, k, h, 0, 0)),
        ]
        for P in (score.shape[-1] for score in scores)
    ]
    score_specs, used_specs, keep_specs = zip(*specs, strict=True)
    return tuple(
        pl.pallas_call(
            functools.partial(_select_kernel, rows=rows, lanes=lanes),
            out_shape=[jax.ShapeDtypeStruct((B, K, H, G, s.shape[-1]), jnp.bool_) for s in scores],
            grid=(pl.cdiv(G, rows), H, K, B),
            in_specs=[pl.BlockSpec((None, 1), lambda g, h, k, b: (b, k)), *score_specs, *used_specs],
            out_specs=list(keep_specs),
            compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
            interpret=interpret,
            name="select_pages",
        )(pages_BxK, *scores, *(mask.astype(jnp.int8) for mask in used))
    )


def _select_kernel(pages_ref: Any, *refs: Any, rows: int, lanes: list[int]) -> None:
    parts = len(lanes)
    score_refs, used_refs, keep_refs = refs[:parts], refs[parts : 2 * parts], refs[2 * parts :]
    G = keep_refs[0].shape[0]
    row = pl.program_id(0) * rows + jnp.arange(rows)[:, None]
    page = [jnp.arange(n)[None, :] for n in lanes]
    inside = [(row < G) & (p < ref.shape[1]) for p, ref in zip(page, keep_refs, strict=True)]
    used = [
        plgpu.load(ref.at[p], mask=p < ref.shape[0], other=0).astype(jnp.int32)
        for p, ref in zip(page, used_refs, strict=True)
    ]
    pages = pages_ref[0]
    every = pages >= sum(jnp.sum(mask) for mask in used)
    bits = []
    for p, ref, mask, here in zip(page, score_refs, used, inside, strict=True):
        score = jnp.where(every, 0.0, plgpu.load(ref.at[row, p], mask=here, other=0))
        ordered = ordered_bits(jnp.where(mask != 0, score, -jnp.inf))
        bits.append(jnp.where(p < ref.shape[1], ordered, jnp.iinfo(jnp.int32).min))  # below every number
    threshold = kth_largest(bits, jnp.full((rows, 1), pages))
    for p, ref, ordered, here in zip(page, keep_refs, bits, inside, strict=True):
        plgpu.store(ref.at[row, p], ordered >= threshold, mask=here)
