"""What TPU kernels of rows share (Pallas, lowered through Mosaic): eight rows a program, one a sublane."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ROWS = 8  # sublanes of a float32 register


def call_rows(kernel: Callable[..., None], out: Any, *args: jax.Array, name: str, interpret: Any) -> Any:
    """Calls `kernel` over blocks of eight rows of arguments and results [N, D].

    Every block sees the whole of an argument [1, D].
    """
    N = args[0].shape[0]

    def block(x: Any) -> pl.BlockSpec:
        rows, D = x.shape
        return pl.BlockSpec((min(rows, ROWS), D), lambda i: (i if rows == N else 0, 0))

    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(pl.cdiv(N, ROWS),),
        in_specs=[block(x) for x in args],
        out_specs=jax.tree.map(block, out),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name=name,
    )(*args)
