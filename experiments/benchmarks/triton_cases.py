"""The kernels in Triton's own language at the named shapes, compiled by Triton, which needs no GPU for it."""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from experiments.benchmarks.compile_check import Check
from experiments.benchmarks.ptxas import WARP, KernelUse, assemble
from pallas_kernels.attention import gpu as attention_gpu
from pallas_kernels.attention import triton as attention
from pallas_kernels.gated_mlp import gpu as gated_gpu
from pallas_kernels.rows_gpu import row_warps
from pallas_kernels.shapes import SHAPES, Shape, distinct
from sol_jax.planning.gpu import TARGETS

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16"}
LAYERS = 16  # of a stacked cache


@dataclasses.dataclass(frozen=True)
class TritonCheck(Check):
    """A kernel without a program around it: `build` makes it for a chip."""

    build: Callable[[str], KernelUse] = lambda chip: KernelUse("", 0, 0, 0, 0)


def checks() -> list[Check]:
    """Attention over listed pages at every shape, and the product over kept channels of every model."""
    found: list[Check] = []
    for dtype, shapes in (("bfloat16", SHAPES), ("float32", distinct("name", "page_size"))):
        for shape in shapes:
            quick = shape in (*distinct("name")[:1], *distinct("name")[-1:])
            build = functools.partial(_attend, shape, dtype)
            found.append(TritonCheck(f"triton attend {shape} {dtype}", quick=quick, build=build))
    for shape in distinct("context", "page_size"):
        found.append(TritonCheck(f"triton list_pages {shape}", build=functools.partial(_list_pages, shape)))
    for shape in distinct("name"):
        for dtype in POINTERS:
            build = functools.partial(_gather, shape, dtype)
            quick = shape.name == SHAPES[-1].name
            found.append(TritonCheck(f"triton gather_gemv {shape.name} {dtype}", quick=quick, build=build))
        build = functools.partial(_list_channels, shape)
        found.append(TritonCheck(f"triton list_channels {shape.name}", build=build))
    return found


def _attend(shape: Shape, dtype: str, chip: str) -> KernelUse:
    B, H, R, d, S = shape.batch, shape.kv_heads, shape.group_size, shape.head_size, shape.context
    tile, tokens, warps, _ = attention_gpu.block_sizes(R, d, jnp.dtype(dtype))
    sizes = {"SPLITS": attention_gpu.num_splits(B * H, tile, S, tokens), "H": H, "L": LAYERS, "R": R, "S": S}
    sizes |= {"N": -(-S // shape.page_size), "D": d, "PAGE": shape.page_size, "ROWS": tile, "TOKENS": tokens}
    sizes |= {"COLUMNS": max(16, pl.next_power_of_2(d)), "SCALE": d**-0.5}
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), POINTERS[dtype])
    types |= dict.fromkeys(("mixed_ptr", "top_ptr", "total_ptr"), "*fp32")
    return build(attention.attend_kernel(), types, sizes, warps, attention.STAGES, chip)


def _list_pages(shape: Shape, chip: str) -> KernelUse:
    P = -(-shape.context // shape.page_size)
    lanes = min(pl.next_power_of_2(P), attention_gpu.LIST_LANES)
    return build(attention.list_kernel(), {}, {"P": P, "LANES": lanes}, 8, 1, chip)


def _gather(shape: Shape, dtype: str, chip: str) -> KernelUse:
    from pallas_kernels.gated_mlp import triton as kernels  # which imports triton

    columns, (_, shares) = gated_gpu.tiling(shape.ffn)
    sizes = {"D": shape.hidden, "F": shape.ffn, "SHARES": shares}
    sizes |= {"CHANNELS": kernels.CHANNELS, "COLUMNS": columns}
    types = dict.fromkeys(("x_ptr", "gate_ptr", "up_ptr"), POINTERS[dtype]) | {"sums_ptr": "*fp32"}
    return build(kernels.gather_gemv, types, sizes, gated_gpu.WARPS, 1, chip)


def _list_channels(shape: Shape, chip: str) -> KernelUse:
    from pallas_kernels.gated_mlp import triton as kernels

    sizes = {"D": shape.hidden, "LANES": pl.next_power_of_2(shape.hidden)}
    return build(kernels.list_channels, {"x_ptr": "*bf16"}, sizes, row_warps(shape.hidden), 1, chip)


def build(
    kernel: Any, types: dict[str, str], sizes: dict[str, Any], warps: int, stages: int, chip: str
) -> KernelUse:
    """What a Triton kernel takes; arguments that are in neither `types` nor `sizes` point to int32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[chip]
    names = kernel.arg_names
    signature = {name: "constexpr" if name in sizes else types.get(name, "*i32") for name in names}
    # As jax-triton says of arrays that XLA allots.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in sizes}
    constants = {(names.index(name),): size for name, size in sizes.items()}
    major, minor = target.capability
    made = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 10 * major + minor, WARP),
        options={"num_warps": warps, "num_stages": stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        ptx = pathlib.Path(folder) / "kernel.ptx"
        ptx.write_text(made.asm["ptx"])
        # Triton assembles with a ptxas of its own, whose registers and spills are others.
        (use,) = assemble(ptx, target, pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    return dataclasses.replace(use, shared=made.metadata.shared)
