"""Attention kernels lowered for devices, and compiled where that needs none."""

import inspect

import jax
import jax.numpy as jnp
import pytest

from kernels.lowering import lowers
from pallas_kernels.attention import LISTED_ROWS, gpu, paged_attention
from pallas_kernels.attention import triton as attention_triton
from pallas_kernels.shapes import SHAPES, distinct


def lower_rows(shape, rows: int, platform: str, dtype: str = "bfloat16") -> None:
    """Decoding of `rows` schedules of each of `shape.batch` sequences against one layer of their caches."""
    abstract = jax.ShapeDtypeStruct
    B, kv_heads, d, page_size = shape.batch, shape.kv_heads, shape.head_size, shape.page_size

    def attended(q, k, v, keep, length, layer):
        def one(q, k, v, keep, length):
            return paged_attention(q, (k, v), keep, length, page_size, layer=layer, implementation="pallas")

        return jax.vmap(jax.vmap(one, in_axes=(0, None, None, 0, None)))(q, k, v, keep, length)

    cache = abstract((B, 2, kv_heads, shape.context, d), dtype)
    listed = platform == "cuda" and rows * shape.group_size <= LISTED_ROWS
    lowers(
        attended,
        abstract((B, rows, kv_heads, shape.group_size, d), dtype),
        cache,
        cache,
        abstract((B, rows, kv_heads, shape.group_size, shape.context // page_size), bool),
        abstract((B,), jnp.int32),
        abstract((), jnp.int32),
        platform=platform,
        kernels={"attend_pages"} | ({"list_pages"} if listed else set()),
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lowering(shape, platform):
    lower_rows(shape, 1, platform)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lowering_of_shared_prefixes(shape, platform):
    """Training: 16 schedules of each sequence."""
    lower_rows(shape, 16, platform)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("shape", distinct("name"), ids=lambda s: s.name)
def test_lowering_of_more_schedules(shape, platform):
    lower_rows(shape, 32, platform)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("shape", distinct("name", "page_size"), ids=str)
def test_lowering_of_float32(shape, platform):
    for rows in (1, 16):
        lower_rows(shape, rows, platform, "float32")


@pytest.mark.parametrize(("d", "dtype"), [(64, "bf16"), (128, "bf16"), (128, "fp32")])
def test_triton_kernel_compiles(d, dtype):
    """For an H200, of which Triton needs none to compile; to run it there is `make gpu-check`."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = attention_triton.attend_kernel()
    tile, tokens, warps, _ = gpu.block_sizes(4, d, jnp.dtype({"bf16": "bfloat16", "fp32": "float32"}[dtype]))
    sizes = {"SPLITS": 16, "H": 8, "L": 16, "R": 4, "S": 32768, "N": 4096, "D": d, "PAGE": 8}
    sizes |= {"ROWS": tile, "TOKENS": tokens, "COLUMNS": d, "SCALE": d**-0.5}
    pointers = dict.fromkeys(("layer", "length", "bits", "page", "count"), "*i32")
    pointers |= dict.fromkeys(("q", "k", "v"), f"*{dtype}") | dict.fromkeys(
        ("mixed", "top", "total"), "*fp32"
    )
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {name: pointers.get(name.removesuffix("_ptr"), "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    built = triton.compile(
        ASTSource(kernel, signature, sizes, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": attention_triton.STAGES},
    )
    assert "cp.async" in built.asm["ptx"]  # loads overlap the products
    assert built.metadata.shared < 200 * 1024
