"""GPU kernels (Pallas, lowered through Triton): attention over chosen pages, and their compact list.

There are `B` sequences, and `R` query rows of one key/value head that read the same keys (the heads of its
group, for every schedule).  Which row keeps which page is a bit of a word [B, H, W, P]: row r is bit r % 32
of word r // 32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.pallas_triton import plgpu
from pallas_kernels.products import dot_on_gpu

# These sizes are untested on a GPU.  They follow byte counts and what Triton makes of them for sm_90
# (registers, spills).
LIST_LANES = 4096  # pages compacted at a time
# This maps rows of a tile to (tokens of a block for 128 bfloat16 channels, warps, stages).  A few rows leave
# the time to memory: 64 tokens of k and v are 32 KB; two blocks are under way (a load behind the list's takes
# two stages), and registers let two programs share a processor: over 64 KB of loads where 40 hide the
# latency.  More rows make it a matrix product, whose accumulators fill the registers: shorter blocks, more
# warps.
BLOCKS = {16: (64, 4, 5), 32: (64, 4, 3), 64: (32, 8, 3), 128: (32, 8, 2)}
# Channels of one product of float32, and up to how many a tile of 16 rows has in one: as two tensor floats
# each, a warp has all of its queries in registers, which then spill.
CHANNELS, WHOLE_CHANNELS = 32, 128
PROGRAMS = {16: 512, 32: 512, 64: 256, 128: 256}  # on 132 processors; tall tiles write more for each part
MOST_TOKENS = 2048  # of one program where that makes more than PROGRAMS: uneven budgets then even out


class PageList(NamedTuple):
    """Pages that some row keeps, first in `page` and in order; their words; how many they are."""

    page_BxHxN: jax.Array
    bits_BxHxN: jax.Array
    count_BxH: jax.Array


def pack_rows(keep_BxHxRxP: jax.Array) -> jax.Array:
    """Returns masks of R rows as words [B, H, W, P], int32."""
    B, H, R, P = keep_BxHxRxP.shape
    padded = jnp.pad(keep_BxHxRxP, ((0, 0), (0, 0), (0, -R % 32), (0, 0))).reshape(B, H, -1, 32, P)
    return jnp.sum(padded.astype(jnp.int32) << jnp.arange(32)[:, None], 3, dtype=jnp.int32)


def list_pages(bits_BxHxP: jax.Array, interpret: bool = False) -> PageList:
    """Returns the pages whose word is not 0, compacted; N >= P."""
    B, H, P = bits_BxHxP.shape
    lanes = min(pl.next_power_of_2(P), LIST_LANES)
    N = pl.cdiv(P, lanes) * lanes
    shape = jax.ShapeDtypeStruct((B, H, N), jnp.int32)

    def row(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, size), lambda h, b: (b, h, 0))

    page, bits, count = pl.pallas_call(
        functools.partial(_list_kernel, lanes=lanes),
        out_shape=[shape, shape, jax.ShapeDtypeStruct((B, H, 1), jnp.int32)],
        grid=(H, B),
        in_specs=[row(P)],
        out_specs=[row(N), row(N), row(1)],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="list_pages",
    )(bits_BxHxP)
    return PageList(page, bits, count[..., 0])


def _list_kernel(bits_ref: Any, page_ref: Any, listed_ref: Any, count_ref: Any, *, lanes: int) -> None:
    P, N = bits_ref.shape[0], page_ref.shape[0]

    def block(i: jax.Array, before: jax.Array) -> jax.Array:
        page = i * lanes + jnp.arange(lanes)
        bits = plgpu.load(bits_ref.at[page], mask=page < P, other=0)
        keep = (bits != 0).astype(jnp.int32)
        rank = before + jnp.cumsum(keep) - keep
        # The others go to the end, backwards: a permutation, for lanes that collide are not masked
        # everywhere.
        slot = jnp.where(keep != 0, rank, N - 1 - (page - rank))
        plgpu.store(page_ref.at[slot], page)
        plgpu.store(listed_ref.at[slot], bits)
        return before + jnp.sum(keep)

    count_ref[0] = jax.lax.fori_loop(0, N // lanes, block, jnp.int32(0))


def attend(
    layer: jax.Array,
    q_BxHxRxd: jax.Array,
    k_BxLxHxSxd: jax.Array,
    v_BxLxHxSxd: jax.Array,
    pages: PageList | jax.Array,
    length_BxR: jax.Array,
    page_size: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns attention in N parts: mixed [B, H, N, R, d], top and total [B, H, N, R] of a `Part`.

    Of a `PageList` (R <= 32) only its pages are read; words [B, H, W, P] say what rows keep of all pages,
    each read once for all rows of a tile.  Row r sees the first `length_BxR[:, r]` tokens.
    """
    (B, H, R, d), (_, L, _, S, _) = q_BxHxRxd.shape, k_BxLxHxSxd.shape
    tile, tokens, warps, stages = block_sizes(R, d, k_BxLxHxSxd.dtype)
    tiles = pl.cdiv(R, tile)
    splits = num_splits(B * H * tiles, tile, S, tokens)
    cache = pl.BlockSpec((None, L, None, S, d), lambda t, n, h, b: (b, 0, h, 0, 0))

    def of_head(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda t, n, h, b: (b, h, *(0 for _ in shape)))

    def of_part(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, *shape), lambda t, n, h, b: (b, h, n, *(0 for _ in shape)))

    if isinstance(pages, PageList):
        listed = [pages.page_BxHxN, pages.count_BxH[..., None]]
        bits_BxHxWxP = pages.bits_BxHxN[:, :, None]
    else:
        listed, bits_BxHxWxP = [], pages
    return tuple(
        pl.pallas_call(
            functools.partial(
                _attend_kernel,
                page_size=page_size,
                tile=tile,
                tokens=tokens,
                splits=splits,
                interpret=interpret,
            ),
            out_shape=[
                jax.ShapeDtypeStruct((B, H, splits, R, d), jnp.float32),
                jax.ShapeDtypeStruct((B, H, splits, R), jnp.float32),
                jax.ShapeDtypeStruct((B, H, splits, R), jnp.float32),
            ],
            # Neighbours in the first grid axis run together: tiles of rows that read the same keys.
            grid=(tiles, splits, H, B),
            in_specs=[
                pl.BlockSpec((1,), lambda t, n, h, b: (0,)),
                pl.BlockSpec((None, R), lambda t, n, h, b: (b, 0)),
                of_head(R, d),
                cache,
                cache,
                of_head(*bits_BxHxWxP.shape[2:]),
                *(of_head(x.shape[2]) for x in listed),
            ],
            out_specs=[of_part(R, d), of_part(R), of_part(R)],
            compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=interpret,
            name="attend_pages",
        )(layer.reshape(1), length_BxR, q_BxHxRxd, k_BxLxHxSxd, v_BxLxHxSxd, bits_BxHxWxP, *listed)
    )


def block_sizes(R: int, d: int, dtype: Any) -> tuple[int, int, int, int]:
    """Returns rows of a tile, tokens of a block, warps and stages."""
    tile = min(max(16, pl.next_power_of_2(R)), max(BLOCKS))
    tokens, warps, stages = BLOCKS[tile]
    return tile, min(tokens * 256 // (pl.next_power_of_2(d) * dtype.itemsize), 128), warps, stages


def num_splits(programs: int, tile: int, S: int, tokens: int) -> int:
    """Returns into how many parts the keys of one head and tile of rows are cut."""
    return min(pl.cdiv(S, tokens), max(pl.cdiv(PROGRAMS[tile], programs), pl.cdiv(S, MOST_TOKENS)))


def _attend_kernel(
    layer_ref: Any,
    length_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    bits_ref: Any,
    *refs: Any,
    page_size: int,
    tile: int,
    tokens: int,
    splits: int,
    interpret: bool,
) -> None:
    *listed, mixed_ref, top_ref, total_ref = refs
    (R, d), layer = q_ref.shape, layer_ref[0]
    tile_index = pl.program_id(0)  # read out of the loop: the interpreter knows it nowhere else
    row = tile_index * tile + jnp.arange(tile)
    column = jnp.arange(max(16, pl.next_power_of_2(d)))
    few = q_ref.dtype.itemsize < 4 or (tile == 16 and len(column) <= WHOLE_CHANNELS)
    of_q = len(column) if few else min(len(column), CHANNELS)
    length = plgpu.load(length_ref.at[row], mask=row < R, other=0)
    limit = jnp.max(length)
    inside = (row < R)[:, None] & (column < d)

    def queries(channel: jax.Array) -> jax.Array:
        mask = (row < R)[:, None] & (channel < d)
        return plgpu.load(q_ref.at[row[:, None], channel[None, :]], mask=mask, other=0)

    q = queries(column) if of_q == len(column) else None

    slots = listed[1][0] * page_size if listed else limit
    blocks = pl.cdiv(slots, tokens)
    share = pl.cdiv(blocks, splits)  # `pl.num_programs` would count a launch's axes, of which there are three
    first = pl.program_id(1) * share

    def kept(page: jax.Array, live: jax.Array) -> jax.Array:
        """Returns which of a block's tokens each row keeps; a tile has few words, picked without a gather."""
        word = jnp.zeros((tile, tokens), jnp.int32)
        for w in range(max(1, tile // 32)):
            index = jnp.minimum(tile_index * (tile // 32) + w, bits_ref.shape[0] - 1)
            bits = plgpu.load(bits_ref.at[index, page], mask=live, other=0)
            word = jnp.where((jnp.arange(tile) // 32 == w)[:, None], bits[None, :], word)
        return (word >> (jnp.arange(tile) % 32)[:, None]) & 1 != 0

    def logits(token: jax.Array, live: jax.Array) -> jax.Array:
        """Returns products of queries and a block's keys, in parts where all channels do not fit."""

        def part(i: Any, total: jax.Array | float, q: jax.Array | None) -> jax.Array:
            channel = i * of_q + jnp.arange(of_q)
            mask = live[:, None] & (channel < d)
            k = plgpu.load(k_ref.at[layer, token[:, None], channel[None, :]], mask=mask, other=0)
            q = queries(channel) if q is None else q
            return total + dot_on_gpu(q, k.astype(q.dtype).T, interpret)

        if q is not None:
            return part(0, 0.0, q)
        parts, start = len(column) // of_q, jnp.zeros((tile, tokens))
        return jax.lax.fori_loop(0, parts, functools.partial(part, q=None), start)

    def block(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        mixed, top, total = carry
        slot = i * tokens + jnp.arange(tokens)
        index, token, live = jax.lax.div(slot, page_size), slot, slot < slots
        if listed:
            page = plgpu.load(listed[0].at[index], mask=live, other=0)
            token = page * page_size + jax.lax.rem(slot, page_size)
            live &= token < limit
        logit = logits(token, live) * d**-0.5
        keep = kept(index, live) & (token < length[:, None])
        logit = jnp.where(keep, logit, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(logit, 1))
        # Rows that keep nothing so far have weights of 0, not NaN.  A NaN logit stays one.
        base = jnp.where(higher == -jnp.inf, 0.0, higher)
        weight, fade = jnp.exp(logit - base[:, None]), jnp.exp(top - base)
        at, here = (layer, token[:, None], column[None, :]), live[:, None] & (column < d)
        v = plgpu.load(v_ref.at[at], mask=here, other=0)
        mixed = mixed * fade[:, None] + dot_on_gpu(weight.astype(v.dtype), v, interpret)
        return mixed, higher, total * fade + jnp.sum(weight, 1)

    start = (jnp.zeros((tile, len(column))), jnp.full((tile,), -jnp.inf), jnp.zeros((tile,)))
    mixed, top, total = jax.lax.fori_loop(first, jnp.minimum(first + share, blocks), block, start)
    plgpu.store(mixed_ref.at[row[:, None], column[None, :]], mixed, mask=inside)
    plgpu.store(top_ref.at[row], top, mask=row < R)
    plgpu.store(total_ref.at[row], total, mask=row < R)
