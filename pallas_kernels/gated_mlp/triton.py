"""The gated MLP of one row as Triton kernels called through jax-triton: what `gpu` computes.

Pallas' lowering through Triton is deprecated; this is the way on, and a peer to measure against.  The module
needs the extra `triton`, so it is imported only where it is used.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.gated_mlp.gpu import WARPS, finish, tiling
from pallas_kernels.rows_gpu import row_warps

CHANNELS = 16  # of a tile: a thread asks for 128 bytes of bfloat16 at a time


def gated_hidden(x_1xD: jax.Array, layer: jax.Array, gate_LxDxF: jax.Array, up_LxDxF: jax.Array) -> jax.Array:
    """Does what `reference.gated_hidden` does for one row [1, F], over the channels that it has."""
    import jax_triton  # refuses to be imported without a GPU

    D, F = gate_LxDxF.shape[1:]
    channels_D, count_1 = jax_triton.triton_call(
        x_1xD,
        kernel=list_channels,
        out_shape=(jax.ShapeDtypeStruct((D,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)),
        grid=(1,),
        num_warps=row_warps(D),
        num_stages=1,
        D=D,
        LANES=triton.next_power_of_2(D),
    )
    columns, (blocks, shares) = tiling(F)
    sums_Cx2x1xF = jax_triton.triton_call(
        layer.reshape(1),
        channels_D,
        count_1,
        x_1xD,
        gate_LxDxF,
        up_LxDxF,
        kernel=gather_gemv,
        out_shape=jax.ShapeDtypeStruct((shares, 2, 1, F), jnp.float32),
        grid=(blocks, shares),
        num_warps=WARPS,
        num_stages=1,
        D=D,
        F=F,
        SHARES=shares,
        CHANNELS=CHANNELS,
        COLUMNS=columns,
    )
    return finish(sums_Cx2x1xF)


@triton.jit
def list_channels(x_ptr, channels_ptr, count_ptr, D: tl.constexpr, LANES: tl.constexpr):
    """Lists the channels where x [D] is not zero, ascending, and counts them."""
    lane = tl.arange(0, LANES)
    kept = tl.load(x_ptr + lane, mask=lane < D, other=0.0) != 0.0
    place = tl.cumsum(kept.to(tl.int32)) - 1
    tl.store(channels_ptr + place, lane, mask=kept)
    tl.store(count_ptr, tl.sum(kept.to(tl.int32)))


@triton.jit
def gather_gemv(
    layer_ptr,
    channels_ptr,
    count_ptr,
    x_ptr,
    gate_ptr,
    up_ptr,
    sums_ptr,
    D: tl.constexpr,
    F: tl.constexpr,
    SHARES: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Computes one share's sums [2, F] of gate and up, for one block of columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.program_id(1)
    count = tl.load(count_ptr)
    start, end = share * count // SHARES, (share + 1) * count // SHARES
    matrix = tl.load(layer_ptr).to(tl.int64) * (D * F)
    gate_ptr += matrix
    up_ptr += matrix
    lane = tl.arange(0, CHANNELS)
    gate_sum = tl.zeros((CHANNELS, COLUMNS), tl.float32)
    up_sum = tl.zeros((CHANNELS, COLUMNS), tl.float32)
    channel = tl.load(channels_ptr + start + lane, mask=start + lane < end, other=0)
    for first in range(start, end, CHANNELS):
        there = first + lane < end
        address = channel[:, None] * F + column[None, :]
        inside = there[:, None] & (column < F)[None, :]
        gate = tl.load(gate_ptr + address, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + address, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + channel, mask=there, other=0.0).to(tl.float32)[:, None]
        ahead = first + CHANNELS + lane
        channel = tl.load(channels_ptr + ahead, mask=ahead < end, other=0)
        gate_sum += x * gate
        up_sum += x * up
    at = sums_ptr + share * (2 * F) + column
    tl.store(at, tl.sum(gate_sum, 0), mask=column < F)
    tl.store(at + F, tl.sum(up_sum, 0), mask=column < F)
