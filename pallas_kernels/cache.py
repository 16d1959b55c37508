"""How parts of caches, and of weights of stacked layers, are read and written.

On a CPU bfloat16 is moved as bits: XLA's compiler widens slices and updates of it to float32 there, and with
them the whole array that they are cut from or written to.  Outside of loops the bits are still a copy of it:
of all embeddings for one token's, of a text's cache for what an episode adds.  The CPU's kernels copy what
moves alone, and write in place.  On a TPU the bits would be that whole array once more too.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels import native
from pallas_kernels.dispatch import choose, current_platform, only_native


def take_layer(stacked: jax.Array, layer: jax.Array) -> jax.Array:
    """Returns `stacked[layer]`."""
    return as_numbers(lax.dynamic_index_in_dim(as_bits(stacked), layer, 0, keepdims=False), stacked.dtype)


def cut(x_HxNxd: jax.Array, start: jax.Array, size: int, implementation: str | None = None) -> jax.Array:
    """Returns `x[:, start : start + size]`; as `lax.dynamic_slice`, it begins earlier if that is beyond."""
    if _moved("cut", x_HxNxd, implementation) == "xla":
        bits = lax.dynamic_slice_in_dim(as_bits(x_HxNxd), start, size, 1)
        return as_numbers(bits, x_HxNxd.dtype)
    H, _, d = x_HxNxd.shape
    out = [jax.ShapeDtypeStruct((H, size, d), x_HxNxd.dtype)]
    # What a vmap shares, such as embeddings, comes once.
    return native.call("cut", out, x_HxNxd, jnp.int32(start), vmap_method="expand_dims")[0]


def put(
    x_HxNxd: jax.Array, new_HxMxd: jax.Array, start: jax.Array, implementation: str | None = None
) -> jax.Array:
    """Returns x with `new` from `start` on; in place, where XLA may."""
    if _moved("put", x_HxNxd, implementation) == "xla":
        bits = lax.dynamic_update_slice_in_dim(as_bits(x_HxNxd), as_bits(new_HxMxd), start, 1)
        return as_numbers(bits, x_HxNxd.dtype)
    return native.call(
        "put",
        [jax.ShapeDtypeStruct(x_HxNxd.shape, x_HxNxd.dtype)],
        x_HxNxd,
        new_HxMxd,
        jnp.int32(start),
        vmap_method="broadcast_all",
        in_place={0: 0},
    )[0]


def take_rows(table_VxD: jax.Array, row: jax.Array, implementation: str | None = None) -> jax.Array:
    """Returns the rows [..., D] of a table at `row` [...]."""
    if _moved("cut", table_VxD, implementation) == "xla":
        return as_numbers(as_bits(table_VxD)[row], table_VxD.dtype)
    one = functools.partial(cut, table_VxD[None], size=1, implementation=implementation)
    return jnp.vectorize(lambda i: one(i)[0, 0], signature="()->(d)")(row)


def _moved(op: str, x: jax.Array, implementation: str | None) -> str:
    """Returns "native" for bfloat16 on a CPU that has the kernels, and "xla" for all that XLA moves well."""
    if x.dtype != jnp.bfloat16 or current_platform() != "cpu":
        return "xla"
    return choose(op, only_native(implementation))


def as_bits(x: jax.Array) -> jax.Array:
    """Returns bfloat16 as its bits (uint16) where a CPU is traced for, and anything else as it is."""
    if x.dtype == jnp.bfloat16 and current_platform() == "cpu":
        return lax.bitcast_convert_type(x, jnp.uint16)
    return x


def as_numbers(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns what `as_bits` made of numbers of `dtype` as such numbers again."""
    bits = dtype == jnp.bfloat16 and x.dtype == jnp.uint16
    return lax.bitcast_convert_type(x, jnp.bfloat16) if bits else x


def row_major(x: jax.Array) -> jax.Array:
    """Returns x; where a TPU is traced for, with the last axis innermost in memory.

    Of products with weights: without it the compiler wants q, k and v of a prefill turned around, and for
    that holds the weights of all layers a second time, turned around too.
    """
    if current_platform() != "tpu":
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
