"""Matrix products of two blocks inside kernels, with float32 accuracy, in the form that each language has."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def dot_on_gpu(a: jax.Array, b: jax.Array, interpret: bool) -> jax.Array:
    """Returns `a @ b`, float32.

    Products of bfloat16 are exact in float32.  For float32 three products of tensor floats (errors near
    2**-21) use the tensor cores; in one of full precision every thread would hold whole operands and spill.
    The interpreter has no tensor floats.
    """
    precision: Any = None
    if a.dtype == jnp.float32:
        precision = "highest" if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def dot_on_tpu(a: jax.Array, b: jax.Array, transposed: bool = True) -> jax.Array:
    """Returns `a @ b.T`, or `a @ b` if not `transposed`, float32."""
    operand = jnp.promote_types(a.dtype, b.dtype)
    precision = "highest" if operand == jnp.float32 else None
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(
        a.astype(operand),
        b.astype(operand),
        contract,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
