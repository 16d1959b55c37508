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

# These sizes are untested on a GPU.  They follow byte counts, and what Triton makes of them for sm_90: 128
# registers a thread, loads of 16 bytes.  A thread asks for 128 bytes of bfloat16 at a time; three programs on
# each SM of an H200 have 48 KB in flight, where 25 KB hide the memory's latency.  All run in one wave:
# programs left over would run alone.
COLUMNS = 256
CHANNELS = 16  # of a tile with one row of x; more rows, whose sums take registers too, have smaller tiles
PROGRAMS = 132 * 3  # at most
MAX_SHARES = 16
WARPS = 4


def gated_hidden(
    x_NxD: jax.Array, layer: jax.Array, gate_LxDxF: jax.Array, up_LxDxF: jax.Array, interpret: bool = False
) -> jax.Array:
    """Does what `reference.gated_hidden` does for few rows [N, F], over the channels that any of them has."""
    N, F = len(x_NxD), gate_LxDxF.shape[-1]
    channels_1xD, count_1 = compact(x_NxD, interpret)
    channels, columns, grid = tiling(N, F)
    sums_Cx2xNxF = pl.pallas_call(
        functools.partial(_gather_kernel, channels=channels, columns=columns),
        out_shape=jax.ShapeDtypeStruct((grid[1], 2, N, F), jnp.float32),
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="gather_gemv",
    )(layer.reshape(1), channels_1xD[0], count_1, x_NxD, gate_LxDxF, up_LxDxF)
    return finish(sums_Cx2xNxF)


def tiling(N: int, F: int) -> tuple[int, int, tuple[int, int]]:
    """Returns channels and columns of a tile, and the grid (blocks of columns, shares of the channels)."""
    columns = min(COLUMNS, pl.next_power_of_2(F))
    blocks = pl.cdiv(F, columns)
    shares = min(MAX_SHARES, max(1, PROGRAMS // blocks))
    return CHANNELS // pl.next_power_of_2(N), columns, (blocks, shares)


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
    channels: int,
    columns: int,
) -> None:
    shares, _, N, F = sums_ref.shape
    layer, count = layer_ref[0], count_ref[0]
    column = pl.program_id(0) * columns + jnp.arange(columns)
    share = pl.program_id(1)
    start, end = lax.div(share * count, shares), lax.div((share + 1) * count, shares)

    def channels_of(tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        slot = start + tile * channels + jnp.arange(channels)
        return plgpu.load(channels_ref.at[slot], mask=slot < end, other=0), slot < end

    def add_tile(tile: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        (channel, there), sums = carry
        address = layer, channel[:, None], column[None, :]
        inside = there[:, None] & (column < F)[None, :]
        gate = plgpu.load(gate_ref.at[address], mask=inside, other=0).astype(jnp.float32)
        up = plgpu.load(up_ref.at[address], mask=inside, other=0).astype(jnp.float32)
        ahead = channels_of(tile + 1)  # so that the next tile's addresses are there when its turn comes
        added = []
        for row in range(N):
            x = plgpu.load(x_ref.at[row, channel], mask=there, other=0).astype(jnp.float32)[:, None]
            added += [sums[2 * row] + x * gate, sums[2 * row + 1] + x * up]
        return ahead, tuple(added)

    # Tiles of sums are reduced at the end, for a reduction crosses warps.
    zeros = (jnp.zeros((channels, columns), jnp.float32),) * (2 * N)
    tiles = pl.cdiv(end - start, channels)
    _, sums = lax.fori_loop(0, tiles, add_tile, (channels_of(jnp.int32(0)), zeros))
    for row in range(N):
        for which in range(2):
            at = sums_ref.at[share, which, row, column]
            plgpu.store(at, jnp.sum(sums[2 * row + which], 0), mask=column < F)
