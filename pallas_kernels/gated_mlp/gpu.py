"""GPU kernels of the gated MLP at few rows (Pallas, lowered through Triton): a product over kept channels.

Rows of [in, out] weights are contiguous, so a channel that is not there is a stretch of memory that is not
read.  One program lists the channels; then each of a grid over (columns, shares of the list) gathers their
rows and sums; XLA adds the shares up and applies the SiLU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.pallas_triton import plgpu
from pallas_kernels.prune.gpu import compact

# These sizes are untested on a GPU.  They follow byte counts, and the registers that XLA needs for sm_90.  A
# thread asks for 128 bytes at a time, of whatever type and for any rows: three programs on each SM of an H200
# have 48 KB in flight, where 25 KB hide the memory's latency.  All run in one wave: programs left over would
# run alone.
COLUMNS = 256
CHANNELS = 4  # of a tile: one for each warp, so that sums stay in a thread
TILES = {2: 4, 4: 2}  # asked for at a time, by the size of a number
PROGRAMS = 132 * 3  # at most
MAX_SHARES = 16
WARPS = 4


def gated_hidden(
    x_NxD: jax.Array, layer: jax.Array, gate_LxDxF: jax.Array, up_LxDxF: jax.Array, interpret: bool = False
) -> jax.Array:
    """Does what `reference.gated_hidden` does for few rows [N, F], over the channels that any of them has."""
    N, F = len(x_NxD), gate_LxDxF.shape[-1]
    channels_1xD, count_1 = compact(x_NxD, interpret)
    columns, grid = tiling(F)
    sums_Cx2xNxF = pl.pallas_call(
        functools.partial(_gather_kernel, tiles=TILES[gate_LxDxF.dtype.itemsize], columns=columns),
        out_shape=jax.ShapeDtypeStruct((grid[1], 2, N, F), jnp.float32),
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="gather_gemv",
    )(layer.reshape(1), channels_1xD[0], count_1, x_NxD, gate_LxDxF, up_LxDxF)
    return finish(sums_Cx2xNxF)


def tiling(F: int) -> tuple[int, tuple[int, int]]:
    """Returns the columns of a tile, and the grid (blocks of columns, shares of the channels)."""
    columns = min(COLUMNS, pl.next_power_of_2(F))
    blocks = pl.cdiv(F, columns)
    return columns, (blocks, min(MAX_SHARES, max(1, PROGRAMS // blocks)))


def finish(sums_Cx2xNxF: jax.Array) -> jax.Array:
    """Returns the hidden activations [N, F] from each share's sums of gate and up."""
    gate_NxF, up_NxF = jnp.sum(sums_Cx2xNxF, 0)
    return jax.nn.silu(gate_NxF) * up_NxF


def _gather_kernel(
    layer_ref: Any,
    channels_ref: Any,
    count_ref: Any,
    x_ref: Any,
    gate_ref: Any,
    up_ref: Any,
    sums_ref: Any,
    *,
    tiles: int,
    columns: int,
) -> None:
    (shares, _, N, F), D = sums_ref.shape, x_ref.shape[1]
    layer, count = layer_ref[0], count_ref[0]
    column = pl.program_id(0) * columns + jnp.arange(columns)
    share = pl.program_id(1)
    start, end = lax.div(share * count, shares), lax.div((share + 1) * count, shares)

    def channels_of(i: jax.Array) -> list[jax.Array]:
        first = start + i * tiles * CHANNELS
        slots = [first + tile * CHANNELS + jnp.arange(CHANNELS) for tile in range(tiles)]
        return [plgpu.load(channels_ref.at[jnp.minimum(slot, D - 1)]) for slot in slots]

    def add_tiles(masked: bool, i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        listed, sums = carry
        loaded = []
        for tile, channel in enumerate(listed):
            there = start + (i * tiles + tile) * CHANNELS + jnp.arange(CHANNELS) < end if masked else None
            inside = _both(there, None if F % columns == 0 else column < F)
            at = layer, channel[:, None], column[None, :]
            weights = [_load(ref.at[at], inside) for ref in (gate_ref, up_ref)]
            loaded.append((weights, [_load(x_ref.at[row, channel], there) for row in range(N)]))
        ahead = channels_of(i + 1)  # so that the next tiles' addresses are there when their turn comes
        for (gate, up), x_N in loaded:
            added = [x[:, None] * weight for x in x_N for weight in (gate, up)]
            sums = tuple(total + one for total, one in zip(sums, added, strict=True))
        return ahead, sums

    # A warp sums every fourth channel; what the warps have is added at the end.  Whole tiles are loaded
    # without masks: ptxas waits for each masked load before it starts the next.
    zeros = (jnp.zeros((CHANNELS, columns), jnp.float32),) * (2 * N)
    whole = lax.div(end - start, CHANNELS * tiles)
    carry = lax.fori_loop(0, whole, functools.partial(add_tiles, False), (channels_of(jnp.int32(0)), zeros))
    turns = pl.cdiv(end - start, CHANNELS * tiles)
    _, sums = lax.fori_loop(whole, turns, functools.partial(add_tiles, True), carry)
    for row in range(N):
        for which in range(2):
            at = sums_ref.at[share, which, row, column]
            plgpu.store(at, jnp.sum(sums[2 * row + which], 0), mask=column < F)


def _both(rows: jax.Array | None, columns: jax.Array | None) -> jax.Array | None:
    """Returns the mask of a tile whose rows and columns have masks, or None if neither has."""
    if rows is None:
        return None if columns is None else jnp.broadcast_to(columns[None, :], (CHANNELS, len(columns)))
    return rows[:, None] & (True if columns is None else columns)


def _load(ref: Any, mask: jax.Array | None) -> jax.Array:
    """Returns float32 numbers, 0 where the mask is false."""
    loaded = plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=0)
    return loaded.astype(jnp.float32)
