"""TPU kernel of the gated MLP at few rows (Pallas, lowered through Mosaic): copies weights of kept channels.

A TPU's memory holds a matrix [D, F] in tiles of 8 channels by 128 columns, and a copy takes whole tiles.
So the kernel is given the same bytes by another name, [D / 8, F / 128, 8, 128], in which a channel's part
of each tile is a matrix of its own.  Two channels of bfloat16 share every 32-bit word and are copied
together: of pairs more are kept than of channels (0.64 for 0.4).  XLA makes the name without a copy; `make
tpu-check` holds it to that.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, CHANNELS = 128, 8  # of a tile
SLOTS = 16  # copies of channels in flight


def gated_hidden(
    x_NxD: jax.Array, layer: jax.Array, gate_LxDxF: jax.Array, up_LxDxF: jax.Array, interpret: Any = False
) -> jax.Array:
    """Does what `reference.gated_hidden` does for few rows [N, F], over the channels that any of them has.

    D is a multiple of CHANNELS and F of LANES.
    """
    (N, D), (L, _, F) = x_NxD.shape, gate_LxDxF.shape
    together = 4 // gate_LxDxF.dtype.itemsize
    groups, tiles, parts = D // CHANNELS, F // LANES, CHANNELS // together

    def by_channel(w_LxDxF: jax.Array) -> jax.Array:
        tiled = w_LxDxF.reshape(L, groups, parts, together, tiles, LANES)
        return tiled.transpose(0, 1, 4, 2, 3, 5)

    sums = jax.ShapeDtypeStruct((N, tiles, together, LANES), jnp.float32)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    hidden = pl.pallas_call(
        functools.partial(_gather_kernel, N=N, D=D),
        out_shape=sums,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(1,),
            in_specs=[anywhere, anywhere],
            out_specs=pl.BlockSpec(sums.shape, lambda *_: (0, 0, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((2, SLOTS, tiles, together, LANES), gate_LxDxF.dtype),
                pltpu.VMEM((2, *sums.shape), jnp.float32),
                pltpu.SMEM((SLOTS,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, SLOTS)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="gather_gemv",
    )(
        layer.reshape(1),
        # XLA decides this, for in a kernel NaN == 0 and NaN != 0 are both false.
        jnp.any(x_NxD != 0, 0).astype(jnp.int32),
        x_NxD.astype(jnp.float32).reshape(-1),
        by_channel(gate_LxDxF),
        by_channel(up_LxDxF),
    )
    return hidden[:, :, 0].reshape(N, F)


def _gather_kernel(
    layer_ref: Any,
    there_ref: Any,
    x_ref: Any,
    gate_ref: Any,
    up_ref: Any,
    hidden_ref: Any,
    buffer_ref: Any,
    sums_ref: Any,
    first_ref: Any,
    semaphores: Any,
    *,
    N: int,
    D: int,
) -> None:
    tiles, together, _ = buffer_ref.shape[2:]
    which_of_pair = lax.broadcasted_iota(jnp.int32, (tiles, together, LANES), 1)

    def copies(first: jax.Array, slot: jax.Array) -> list[Any]:
        """Of the channels that are copied together, from `first` on."""
        group, part = lax.div(first, CHANNELS), lax.div(lax.rem(first, CHANNELS), together)
        return [
            pltpu.make_async_copy(
                weights.at[layer_ref[0], group, :, part],
                buffer_ref.at[which, slot],
                semaphores.at[which, slot],
            )
            for which, weights in enumerate((gate_ref, up_ref))
        ]

    def of_each(value: Any, first: jax.Array) -> jax.Array:
        """`value` of each channel, where its weights are."""
        found = jnp.full(which_of_pair.shape, value(first))
        for i in range(1, together):
            found = jnp.where(which_of_pair == i, value(first + i), found)
        return found

    def add(slot: jax.Array) -> None:
        """Waits for the channels that are copied to the slot, and adds them to the sums."""
        first = first_ref[slot]
        there = of_each(lambda channel: there_ref[channel], first) != 0
        for which, copy in enumerate(copies(first, slot)):
            copy.wait()
            # A channel that came along may have any weights, and 0 * NaN is NaN.
            weights = jnp.where(there, buffer_ref[which, slot].astype(jnp.float32), 0.0)
            for row in range(N):
                x = of_each(lambda channel, row=row: x_ref[row * D + channel], first)
                sums_ref[which, row] += x * weights

    def fetch(first: jax.Array, fetched: jax.Array) -> jax.Array:
        slot = fetched % SLOTS

        @pl.when(fetched >= SLOTS)
        def _() -> None:
            add(slot)

        first_ref[slot] = first
        for copy in copies(first, slot):
            copy.start()
        return fetched + 1

    def look(i: jax.Array, fetched: jax.Array) -> jax.Array:
        first = i * together
        there = sum(there_ref[first + k] for k in range(together))
        return lax.cond(there != 0, fetch, lambda _, same: same, first, fetched)

    sums_ref[...] = jnp.zeros_like(sums_ref)
    fetched = lax.fori_loop(0, D // together, look, jnp.int32(0))
    lax.fori_loop(jnp.maximum(fetched - SLOTS, 0), fetched, lambda i, _: add(i % SLOTS), None)
    gate, up = (jnp.sum(sums_ref[which], 2, keepdims=True) for which in range(2))
    gated = gate / (1 + jnp.exp(-gate)) * up
    hidden_ref[...] = jnp.broadcast_to(gated, hidden_ref.shape)
