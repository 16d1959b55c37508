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

# These sizes are untested on a GPU.  They follow byte counts and what XLA makes of them (registers, spills,
# loads under way).  Scoring moves bytes and little else: 32 KB of bounds are 64 pages of 2 x 128 bfloat16,
# which give a single row at 32k tokens 256 programs of 8 heads.  More pages of float32 spill.
BOUNDS_BYTES = 16  # that a thread loads of a key: one instruction
SCORE_BYTES, SCORE_ROWS, MOST_PAGES = 32 << 10, 64, {2: 128, 4: 32}  # pages by the size of a number
# Columns of one product; in one of all columns of float32, as two tensor floats each, registers spill.
SCORE_COLUMNS = {2: 512, 4: 64}
# A program holds its rows' scores in registers while it bisects: 16 of a thread's 255 for up to 8,192 pages.
# Short rows share a program; long ones do not, so that one sequence's heads keep many processors busy.
SELECT_LANES, LANES_PER_WARP, MAX_WARPS = 2048, 512, 16


def page_bounds(k_HxNxd: jax.Array, valid_N: jax.Array, page_size: int, interpret: bool = False) -> jax.Array:
    """Does what `reference.page_bounds` does, for one sequence (vmap adds grid axes)."""
    H, N, d = k_HxNxd.shape
    P = pl.cdiv(N, page_size)
    of_a_token = 128 * BOUNDS_BYTES // k_HxNxd.dtype.itemsize  # channels that the program's threads load
    pages = max(1, of_a_token // pl.next_power_of_2(d))
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
    (N, d), P = k_ref.shape, bounds_ref.shape[0]
    page = pl.program_id(0) * pages + jnp.arange(pages)
    column = jnp.arange(pl.next_power_of_2(d))

    def several(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Adds some tokens of each page."""
        tokens = [page * page_size + i * unrolled + slot for slot in range(unrolled)]
        # Without masks: ptxas waits for each masked load before it starts the next.
        at = [jnp.minimum(token, N - 1) for token in tokens]
        loaded = [
            (plgpu.load(valid_ref.at[here]), _rows(k_ref, (here,), column).astype(jnp.float32)) for here in at
        ]
        for token, (valid, k) in zip(tokens, loaded, strict=True):
            here, (high, low, spoilt) = ((valid != 0) & (token < N))[:, None], carry
            # The hardware's maximum and minimum drop NaN; a page with one must keep it.
            spoilt |= (here & is_nan(k)).astype(jnp.int32)
            high = jnp.maximum(high, jnp.where(here, k, -jnp.inf))
            carry = high, jnp.minimum(low, jnp.where(here, k, jnp.inf)), spoilt
        return carry

    # A page's tokens follow each other in a thread: as an axis of a block, warps would have to exchange them.
    unrolled = next(n for n in (8, 4, 2, 1) if page_size % n == 0)
    shape = (pages, len(column))
    start = jnp.full(shape, -jnp.inf), jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.int32)
    high, low, spoilt = jax.lax.fori_loop(0, page_size // unrolled, several, start)
    store = (page < P)[:, None] & (column < d)
    for offset, bound in ((0, high), (d, low)):
        at = bounds_ref.at[page[:, None], offset + column[None, :]]
        plgpu.store(at, jnp.where(spoilt != 0, jnp.nan, bound).astype(bounds_ref.dtype), mask=store)


def _rows(ref: Any, at: tuple[Any, ...], column: jax.Array) -> jax.Array:
    """Returns rows of a matrix, the last axis of whose place `at` they are, with 0 beyond its columns."""
    (*before, row), d = at, ref.shape[-1]
    place = ref.at[(*before, row[:, None], column[None, :])]
    if d % len(column) == 0:
        return plgpu.load(place)
    return plgpu.load(place, mask=jnp.broadcast_to(column < d, (len(row), len(column))), other=0)


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
    of_page = pl.next_power_of_2(width) * bounds_BxLxHxPx2d.dtype.itemsize
    pages = min(max(16, SCORE_BYTES // of_page), MOST_PAGES[bounds_BxLxHxPx2d.dtype.itemsize])
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
    operand = jnp.promote_types(q_ref.dtype, bounds_ref.dtype)
    columns = max(16, pl.next_power_of_2(width))
    together = min(columns, SCORE_COLUMNS[operand.itemsize])

    def part(i: Any, score: jax.Array | float) -> jax.Array:
        column = i * together + jnp.arange(together)
        # Rows and pages beyond the last are those again, and are not stored: masks would hold up the loads.
        q = _rows(q_ref, (jnp.minimum(row, R - 1)[:, 0],), column)
        bounds = _rows(bounds_ref, (layer_ref[0], jnp.minimum(page, P - 1)), column)
        return score + dot_on_gpu(q.astype(operand), bounds.astype(operand).T, interpret)

    @pl.when(skip_ref[0] == 0)
    def _() -> None:
        score = (
            part(0, 0.0)
            if together == columns
            else jax.lax.fori_loop(0, columns // together, part, jnp.zeros((rows, pages)))
        )
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
