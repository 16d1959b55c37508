"""GPU kernels of attention over listed pages in Triton's own language, called through jax-triton.

They are the way on where Pallas has no lowering through Triton any more, so they need none of it, and are its
peers in benchmarks.  Triton and jax-triton are an extra, so they are imported where they are used.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention.gpu import LIST_LANES, PageList, block_sizes, num_splits

STAGES = 3  # two blocks of keys and values under way


def list_pages(bits_BxHxP: jax.Array) -> PageList:
    """Does what `gpu.list_pages` does; what stands behind the listed pages is not written."""
    import jax_triton

    B, H, P = bits_BxHxP.shape
    shapes = [(B, H, P), (B, H, P), (B, H)]
    return PageList(
        *jax_triton.triton_call(
            bits_BxHxP,
            kernel=list_kernel(),
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes],
            grid=(B * H,),
            name="list_pages",
            num_warps=8,
            num_stages=1,
            P=P,
            LANES=min(pl.next_power_of_2(P), LIST_LANES),
        )
    )


def attend(
    layer: jax.Array,
    q_BxHxRxd: jax.Array,
    k_BxLxHxSxd: jax.Array,
    v_BxLxHxSxd: jax.Array,
    bits_BxHxP: jax.Array,
    length_BxR: jax.Array,
    page_size: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Does what `gpu.attend` does of the pages whose word is not 0, which it lists."""
    import jax_triton

    pages = list_pages(bits_BxHxP)
    (B, H, R, d), (_, L, _, S, _) = q_BxHxRxd.shape, k_BxLxHxSxd.shape
    tile, tokens, warps, _ = block_sizes(R, d, k_BxLxHxSxd.dtype)
    splits = num_splits(B * H, tile, S, tokens)
    shapes = [(B, H, splits, R, d), (B, H, splits, R), (B, H, splits, R)]
    return tuple(
        jax_triton.triton_call(
            layer.reshape(1),
            length_BxR,
            q_BxHxRxd,
            k_BxLxHxSxd,
            v_BxLxHxSxd,
            pages.bits_BxHxN,
            pages.page_BxHxN,
            pages.count_BxH,
            kernel=attend_kernel(),
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
            grid=(splits, H, B),
            name="attend_pages",
            num_warps=warps,
            num_stages=STAGES,
            SPLITS=splits,
            H=H,
            L=L,
            R=R,
            S=S,
            N=pages.page_BxHxN.shape[-1],
            D=d,
            PAGE=page_size,
            ROWS=tile,
            TOKENS=tokens,
            COLUMNS=max(16, pl.next_power_of_2(d)),
            SCALE=d**-0.5,
        )
    )


@functools.cache
def list_kernel() -> Any:
    """Returns the kernel, made on first use, which computes what `gpu._list_kernel` does for a head."""
    import triton
    import triton.language as tl

    @triton.jit
    def list_pages(bits_ptr, page_ptr, listed_ptr, count_ptr, P: tl.constexpr, LANES: tl.constexpr):
        head = tl.program_id(0)
        before = 0
        for first in range(0, P, LANES):
            page = first + tl.arange(0, LANES)
            bits = tl.load(bits_ptr + head * P + page, page < P, 0)
            keep = (bits != 0).to(tl.int32)
            at = head * P + before + tl.cumsum(keep, 0) - keep
            tl.store(page_ptr + at, page, bits != 0)
            tl.store(listed_ptr + at, bits, bits != 0)
            before += tl.sum(keep, 0)
        tl.store(count_ptr + head, before)

    return list_pages


@functools.cache
def attend_kernel() -> Any:
    """Returns the kernel, made on first use, which computes what `gpu._attend_kernel` does."""
    import triton
    import triton.language as tl

    @triton.jit
    def attend_pages(
        layer_ptr,
        length_ptr,
        q_ptr,
        k_ptr,
        v_ptr,
        bits_ptr,
        page_ptr,
        count_ptr,
        mixed_ptr,
        top_ptr,
        total_ptr,
        SPLITS: tl.constexpr,
        H: tl.constexpr,
        L: tl.constexpr,
        R: tl.constexpr,
        S: tl.constexpr,
        N: tl.constexpr,
        D: tl.constexpr,
        PAGE: tl.constexpr,
        ROWS: tl.constexpr,
        TOKENS: tl.constexpr,
        COLUMNS: tl.constexpr,
        SCALE: tl.constexpr,
    ):
        split, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        head = b * H + h
        row, column, lane = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, TOKENS)
        row_in, column_in = row < R, column < D
        length = tl.load(length_ptr + b * R + row, row_in, 0)
        limit = tl.max(length, 0)
        q_at = (head * R + row)[:, None] * D + column[None, :]
        q = tl.load(q_ptr + q_at, row_in[:, None] & column_in[None, :], 0.0)

        # Of a stacked cache more than 2**31 elements may lie before this head's keys.
        cache = ((b * L + tl.load(layer_ptr)).to(tl.int64) * H + h) * S * D
        slots = tl.load(count_ptr + head) * PAGE
        blocks = tl.cdiv(slots, TOKENS)
        share = tl.cdiv(blocks, SPLITS)
        mixed = tl.zeros([ROWS, COLUMNS], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        # The list is read a block ahead: keys and values then wait for no load of their own turn, and Triton
        # needs no buffers of them beyond those of the blocks that are under way.
        first, last = split * share, tl.minimum((split + 1) * share, blocks)
        listed = first * TOKENS + lane < slots
        page = tl.load(page_ptr + head * N + (first * TOKENS + lane) // PAGE, listed, 0)
        bits = tl.load(bits_ptr + head * N + (first * TOKENS + lane) // PAGE, listed, 0)
        for i in range(first, last):
            slot = i * TOKENS + lane
            token = page * PAGE + slot % PAGE
            at = token[:, None] * D + column[None, :]
            there = ((slot < slots) & (token < limit))[:, None] & column_in[None, :]
            k = tl.load(k_ptr + cache + at, there, 0.0)
            logit = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="tf32x3") * SCALE
            keep = ((bits[None, :] >> row[:, None]) & 1 != 0) & (token[None, :] < length[:, None])
            ahead = slot + TOKENS
            page = tl.load(page_ptr + head * N + ahead // PAGE, ahead < slots, 0)
            bits = tl.load(bits_ptr + head * N + ahead // PAGE, ahead < slots, 0)
            logit = tl.where(keep, logit, float("-inf"))
            higher = tl.maximum(top, tl.max(logit, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weight, fade = tl.exp(logit - base[:, None]), tl.exp(top - base)
            v = tl.load(v_ptr + cache + at, there, 0.0)
            mixed = mixed * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="tf32x3")
            total = total * fade + tl.sum(weight, 1)
            top = higher
        part = (head * SPLITS + split) * R + row
        tl.store(mixed_ptr + part[:, None] * D + column[None, :], mixed, row_in[:, None] & column_in[None, :])
        tl.store(top_ptr + part, top, row_in)
        tl.store(total_ptr + part, total, row_in)

    return attend_pages
