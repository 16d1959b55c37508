"""TPU kernels of attention over chosen pages (Pallas, lowered through Mosaic).

There are `B` sequences, and `R` query rows of one key/value head that read the same keys (the heads of its
group, for every schedule).  What a row sees is a count per page: its first `visible` tokens, 0 where it does
not keep the page.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.products import dot_on_tpu

# These sizes are untested on a TPU.  128 pages make full lanes of what is known by page; at 8 tokens of 128
# bfloat16 channels a block of k and v is half a megabyte.  Of larger pages, of float32 or of many rows fewer
# make a block (`block_pages`): a kernel has 16 MB unless it is told otherwise, and a v4 has no more.
PAGES, BLOCK_BYTES = 128, 12 << 20

Parts = tuple[jax.Array, jax.Array, jax.Array]


def block_pages(R: int, page_size: int, d: int, dtype: Any) -> int:
    """Returns how many pages a block has: PAGES, halved until BLOCK_BYTES hold what a kernel has at once.

    That is k and v twice, since the next are being copied, and once in float32; what leads from pages to
    tokens; and, for each row and token, its logit, its weight and two masks.
    """

    def size(pages: int) -> int:
        by_token = 2 * d * (2 * jnp.dtype(dtype).itemsize + 4) + 4 * 3 * PAGES + 4 * 4 * max(R, 8)
        return by_token * pages * page_size

    pages = PAGES
    while pages > 1 and size(pages) > BLOCK_BYTES:
        pages //= 2
    return pages


def attend_listed(
    layer: jax.Array,
    count_BxH: jax.Array,
    page_BxHxN: jax.Array,
    q_BxHxRxd: jax.Array,
    k_BxLxHxPxpxd: jax.Array,
    v_BxLxHxPxpxd: jax.Array,
    visible_BxHxRxN: jax.Array,
    interpret: Any = False,
) -> Parts:
    """Returns attention over the first `count` listed pages as a `Part`, [B, H, R, d] and twice [B, H, R, 1].

    Each page is copied from the cache by itself, the next block's while one is worked on.
    """
    (B, H, R, d), (page_size, _) = q_BxHxRxd.shape, k_BxLxHxPxpxd.shape[-2:]
    N = page_BxHxN.shape[-1]
    pages, lanes = _blocks(N, block_pages(R, page_size, d, k_BxLxHxPxpxd.dtype))
    visible_BxHxRxN = _whole_blocks(visible_BxHxRxN, lanes)
    buffer = pltpu.VMEM((2, pages, page_size, d), k_BxLxHxPxpxd.dtype)
    return _call(
        functools.partial(_listed_kernel, R=R, page_size=page_size, pages=pages),
        (layer.reshape(1), count_BxH),
        (q_BxHxRxd, visible_BxHxRxN, page_BxHxN[:, :, None], k_BxLxHxPxpxd, v_BxLxHxPxpxd),
        [
            pl.BlockSpec(
                (None, None, R, lanes),
                lambda b, h, j, _, count: (b, h, 0, lax.div(_at_most(j, count[b, h], pages) * pages, lanes)),
            ),
            pl.BlockSpec((None, None, 1, N), lambda b, h, j, *_: (b, h, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        [buffer, buffer, pltpu.SemaphoreType.DMA((2, 2))],
        (B, H, pl.cdiv(N, pages)),
        interpret,
    )


def attend_whole(
    layer: jax.Array,
    limit_B: jax.Array,
    q_BxHxRxd: jax.Array,
    k_BxLxHxSxd: jax.Array,
    v_BxLxHxSxd: jax.Array,
    visible_BxHxRxP: jax.Array,
    page_size: int,
    interpret: Any = False,
) -> Parts:
    """Returns the same over the first `limit` tokens in order, each read once for all rows."""
    (B, H, R, d), S, P = q_BxHxRxd.shape, k_BxLxHxSxd.shape[3], visible_BxHxRxP.shape[-1]
    pages, lanes = _blocks(P, block_pages(R, page_size, d, k_BxLxHxSxd.dtype))
    tokens = pages * page_size
    visible_BxHxRxP = _whole_blocks(visible_BxHxRxP, lanes)

    def cache_block(b: Any, h: Any, j: Any, layer: Any, limit: Any) -> tuple[Any, ...]:
        return b, layer[0], h, _at_most(j, limit[b], tokens), 0

    cache = pl.BlockSpec((None, None, None, tokens, d), cache_block)
    return _call(
        functools.partial(_whole_kernel, page_size=page_size),
        (layer.reshape(1), limit_B),
        (q_BxHxRxd, visible_BxHxRxP, k_BxLxHxSxd, v_BxLxHxSxd),
        [
            pl.BlockSpec(
                (None, None, R, lanes),
                lambda b, h, j, _, limit: (b, h, 0, lax.div(_at_most(j, limit[b], tokens) * pages, lanes)),
            ),
            cache,
            cache,
        ],
        [],
        (B, H, pl.cdiv(S, tokens)),
        interpret,
    )


def _blocks(P: int, pages: int) -> tuple[int, int]:
    """Returns how many of P pages a block of keys has, and a block of the masks, which has full lanes."""
    return (P, P) if pages >= P else (pages, PAGES)


def _at_most(j: Any, count: Any, size: int) -> Any:
    """Returns block j, or the one in which `count` ends: an index that stands still copies nothing."""
    return jnp.minimum(j, lax.div(jnp.maximum(count - 1, 0), size))


def _whole_blocks(visible_BxHxRxP: jax.Array, pages: int) -> jax.Array:
    """Pads the masks so that no row sees a page past the last, where a block would hold anything."""
    return jnp.pad(visible_BxHxRxP, ((0, 0), (0, 0), (0, 0), (0, -visible_BxHxRxP.shape[-1] % pages)))


def _call(
    kernel: Any,
    scalars: tuple[jax.Array, ...],
    arrays: tuple[jax.Array, ...],
    specs: list[pl.BlockSpec],
    scratch: list[Any],
    grid: tuple[int, int, int],
    interpret: Any,
) -> Parts:
    """Calls a kernel over (B, H, blocks of keys).

    Its first array is the queries, and its results stay in place from block to block.
    """
    B, H, R, d = arrays[0].shape

    def rows(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, R, size), lambda b, h, j, *_: (b, h, 0, 0))

    return tuple(
        pl.pallas_call(
            kernel,
            out_shape=[jax.ShapeDtypeStruct((B, H, R, size), jnp.float32) for size in (d, 1, 1)],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=grid,
                in_specs=[rows(d), *specs],
                out_specs=[rows(d), rows(1), rows(1)],
                scratch_shapes=scratch,
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            interpret=interpret,
            name="attend_pages",
        )(*scalars, *arrays)
    )


def _listed_kernel(
    layer_ref: Any,
    count_ref: Any,
    q_ref: Any,
    visible_ref: Any,
    page_ref: Any,
    k_hbm: Any,
    v_hbm: Any,
    mixed_ref: Any,
    top_ref: Any,
    total_ref: Any,
    k_ref: Any,
    v_ref: Any,
    copied: Any,
    *,
    R: int,
    page_size: int,
    pages: int,
) -> None:
    b, h, j = (pl.program_id(axis) for axis in range(3))
    count = count_ref[b, h]

    def each_copy(block: Any, act: Any) -> None:
        """Calls `act` on the copy of k and of v of every listed page of a block."""
        slot = block & 1

        def both(i: Any, _: Any) -> None:
            page = page_ref[0, block * pages + i]
            for kv, (cache, buffer) in enumerate(((k_hbm, k_ref), (v_hbm, v_ref))):
                source = cache.at[b, layer_ref[0], h, page]
                act(pltpu.make_async_copy(source, buffer.at[slot, i], copied.at[slot, kv]))

        lax.fori_loop(0, jnp.clip(count - block * pages, 0, pages), both, None)

    @pl.when(j == 0)
    def _() -> None:
        _start(mixed_ref, top_ref, total_ref)
        each_copy(0, lambda copy: copy.start())

    @pl.when(j * pages < count)
    def _() -> None:
        each_copy(j + 1, lambda copy: copy.start())
        each_copy(j, lambda copy: copy.wait())
        shape = pages * page_size, q_ref.shape[-1]
        k, v = k_ref[j & 1].reshape(shape), v_ref[j & 1].reshape(shape)
        filled = (count - j * pages) * page_size
        first = lax.rem(j * pages, visible_ref.shape[-1])
        _add_block(q_ref, visible_ref, first, k, v, filled, page_size, mixed_ref, top_ref, total_ref)


def _whole_kernel(
    layer_ref: Any,
    limit_ref: Any,
    q_ref: Any,
    visible_ref: Any,
    k_ref: Any,
    v_ref: Any,
    mixed_ref: Any,
    top_ref: Any,
    total_ref: Any,
    *,
    page_size: int,
) -> None:
    b, j = pl.program_id(0), pl.program_id(2)
    filled = limit_ref[b] - j * k_ref.shape[0]

    @pl.when(j == 0)
    def _() -> None:
        _start(mixed_ref, top_ref, total_ref)

    @pl.when(filled > 0)
    def _() -> None:
        first = lax.rem(j * (k_ref.shape[0] // page_size), visible_ref.shape[-1])
        kv = k_ref[...], v_ref[...]
        _add_block(q_ref, visible_ref, first, *kv, filled, page_size, mixed_ref, top_ref, total_ref)


def _start(mixed_ref: Any, top_ref: Any, total_ref: Any) -> None:
    mixed_ref[...] = jnp.zeros_like(mixed_ref)
    top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)


def _add_block(
    q_ref: Any,
    visible_ref: Any,
    first: jax.Array,
    k_Nxd: jax.Array,
    v_Nxd: jax.Array,
    filled: jax.Array,
    page_size: int,
    mixed_ref: Any,
    top_ref: Any,
    total_ref: Any,
) -> None:
    """Takes one step of the running softmax, over a block of pages whose first `filled` tokens are there.

    Its first page is that of lane `first`.
    """
    (N, d), P = k_Nxd.shape, visible_ref.shape[-1]
    # A product with a matrix of ones and zeros leads from pages to tokens: lanes cannot be repeated
    # otherwise.
    page_PxN = (lax.broadcasted_iota(jnp.int32, (P, N), 0) - first) * page_size
    token_PxN = lax.broadcasted_iota(jnp.int32, (P, N), 1)
    inside_PxN = (token_PxN >= page_PxN) & (token_PxN < page_PxN + page_size)
    visible_RxN = dot_on_tpu(visible_ref[...], inside_PxN.astype(jnp.float32), transposed=False)
    offset_1xN = jnp.sum(jnp.where(inside_PxN, token_PxN - page_PxN, 0), 0, keepdims=True)
    keep_RxN = offset_1xN.astype(jnp.float32) < visible_RxN

    logit_RxN = jnp.where(keep_RxN, dot_on_tpu(q_ref[...], k_Nxd) * d**-0.5, -jnp.inf)
    top = top_ref[...]
    higher = jnp.maximum(top, jnp.max(logit_RxN, -1, keepdims=True))
    # Rows that keep nothing so far have weights of 0, not NaN.  A NaN logit stays one.
    base = jnp.where(higher == -jnp.inf, 0.0, higher)
    weight_RxN, fade = jnp.exp(logit_RxN - base), jnp.exp(top - base)
    there_Nx1 = lax.broadcasted_iota(jnp.int32, (N, 1), 0) < filled
    v_Nxd = jnp.where(there_Nx1, v_Nxd, 0)  # what was not copied may hold NaN, and 0 * NaN is NaN
    added = dot_on_tpu(weight_RxN.astype(v_Nxd.dtype), v_Nxd, transposed=False)
    mixed_ref[...] = mixed_ref[...] * fade + added
    total_ref[...] = total_ref[...] * fade + jnp.sum(weight_RxN, -1, keepdims=True)
    top_ref[...] = higher
