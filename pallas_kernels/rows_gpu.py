"""What GPU kernels of rows share (Pallas, lowered through Triton): a program holds a row in registers.

Rows are padded to a power of two, and the padding's lanes are masked.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.pallas_triton import plgpu


def row_warps(D: int) -> int:
    """Returns the warps of a program that holds a row of D.

    A thread has 16 numbers, until a block has all the warps it may.
    """
    return min(32, max(4, pl.next_power_of_2(D) // 512))


def call_rows(
    kernel: Callable[..., None], out: Any, *args: jax.Array, name: str, interpret: bool, programs: int = 0
) -> Any:
    """Calls `kernel` once for each row of the first argument [N, D], or `programs` times.

    `out` has the shapes of the results.
    """
    N, D = args[0].shape
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(programs or N,),
        compiler_params=plgpu.CompilerParams(num_warps=row_warps(D), num_stages=1),
        interpret=interpret,
        name=name,
    )(*args)


def lanes(D: int) -> tuple[jax.Array, jax.Array]:
    """Returns the lanes of a row, and whether each holds a channel."""
    lane = jnp.arange(pl.next_power_of_2(D))
    return lane, lane < D
