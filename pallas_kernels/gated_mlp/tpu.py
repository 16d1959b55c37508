"""TPU kernel of the gated MLP at few rows (Pallas, lowered through Mosaic): copies weights of kept channels.

A TPU's memory holds matrices in tiles of several rows, and a copy takes whole tiles.  So the kernel wants
each channel's weights as a matrix of its own, [F / 128, 128]: store them so and pass them reshaped to
[D, F], and XLA cancels the two reshapes; stored as [D, F] they are laid out anew at every call, which costs
more than the kernel saves.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SLOTS = 16  # copies of channels in flight


def gated_hidden(
    x_NxD: jax.Array, layer: jax.Array, gate_LxDxF: jax.Array, up_LxDxF: jax.Array, interpret: Any = False
) -> jax.Array:
    """Does what `reference.gated_hidden` does for few rows [N, F], over the channels that any of them has.

    F is a multiple of LANES.
    """
    (N, D), (L, _, F) = x_NxD.shape, gate_LxDxF.shape
    by_channel = (L, D, F // LANES, LANES)
    sums = jax.ShapeDtypeStruct((N, F // LANES, LANES), jnp.float32)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    hidden = pl.pallas_call(
        functools.partial(_gather_kernel, N=N, D=D),
        out_shape=sums,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(1,),
            in_specs=[anywhere, anywhere],
            out_specs=pl.BlockSpec(sums.shape, lambda *_: (0, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((2, SLOTS, *by_channel[2:]), gate_LxDxF.dtype),
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
        gate_LxDxF.reshape(by_channel),
        up_LxDxF.reshape(by_channel),
    )
    return hidden.reshape(N, F)


def _gather_kernel(
    layer_ref: Any,
    there_ref: Any,
    x_ref: Any,
    gate_ref: Any,
    up_ref: Any,
    hidden_ref: Any,
    buffer_ref: Any,
    sums_ref: Any,
    channel_ref: Any,
    semaphores: Any,
    *,
    N: int,
    D: int,
) -> None:
    def copies(channel: jax.Array, slot: jax.Array) -> list[Any]:
        return [
            pltpu.make_async_copy(
                weights.at[layer_ref[0], channel], buffer_ref.at[which, slot], semaphores.at[which, slot]
            )
            for which, weights in enumerate((gate_ref, up_ref))
        ]

    def add(slot: jax.Array) -> None:
        """Waits for the channel that is copied to the slot, and adds it to the sums."""
        channel = channel_ref[slot]
        for which, copy in enumerate(copies(channel, slot)):
            copy.wait()
            weights = buffer_ref[which, slot].astype(jnp.float32)
            for row in range(N):
                sums_ref[which, row] += x_ref[row * D + channel] * weights

    def fetch(channel: jax.Array, fetched: jax.Array) -> jax.Array:
        slot = fetched % SLOTS

        @pl.when(fetched >= SLOTS)
        def _() -> None:
            add(slot)

        channel_ref[slot] = channel
        for copy in copies(channel, slot):
            copy.start()
        return fetched + 1

    def look(channel: jax.Array, fetched: jax.Array) -> jax.Array:
        return lax.cond(there_ref[channel] != 0, fetch, lambda _, same: same, channel, fetched)

    sums_ref[...] = jnp.zeros_like(sums_ref)
    fetched = lax.fori_loop(0, D, look, jnp.int32(0))
    lax.fori_loop(jnp.maximum(fetched - SLOTS, 0), fetched, lambda i, _: add(i % SLOTS), None)
    gate, up = sums_ref[0], sums_ref[1]
    hidden_ref[...] = gate / (1 + jnp.exp(-gate)) * up
