"""The operations of dense products, which pick an implementation: `reference` in XLA, or a kernel (`native`).

GPUs and TPUs have none, for XLA's products there are as good as it gets: "pallas" and "triton" mean XLA's.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import native
from pallas_kernels.dispatch import choose, no_gradient, only_native
from pallas_kernels.linear import reference
from pallas_kernels.one_row import one_row


def project(
    x_D: jax.Array,
    weights: Sequence[jax.Array],
    implementation: str | None = None,
    layer: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """Returns `x @ w` [F], float32, for a row x [D] and each of the weights [D, F]; vmaps add rows.

    With `layer` (int32) the weights are stacked, [L, D, F], and a kernel reads the layer in place.
    """
    op, dtype = "project", weights[0].dtype.name
    if choose(op, only_native(implementation), asks_again=True, dtype=dtype) == "xla":
        return no_gradient(op, reference.project)(x_D, tuple(weights), layer)

    def rows(x_NxD: jax.Array, layer: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
        N = len(x_NxD)
        if choose(op, only_native(implementation), rows=N, dtype=dtype) == "xla":
            return reference.project(x_NxD, weights, layer)
        out = [native.floats(N, w.shape[-1]) for w in weights]
        return tuple(native.call("project", out, x_NxD.astype(jnp.float32), layer, *weights, gated=False))

    stacked = tuple(weights) if layer is not None else tuple(w[None] for w in weights)
    layer = jnp.int32(0) if layer is None else layer
    return no_gradient(op, one_row(rows, num_shared=1 + len(stacked)))(x_D, layer, *stacked)


def match(x_D: jax.Array, table_VxD: jax.Array, implementation: str | None = None) -> jax.Array:
    """Returns the scalar products [..., V], float32, of x [..., D] with each row of the table."""
    op, dtype = "match", table_VxD.dtype.name
    if choose(op, only_native(implementation), asks_again=True, dtype=dtype) == "xla":
        return no_gradient(op, reference.match)(x_D, table_VxD)

    def rows(x_NxD: jax.Array, table_VxD: jax.Array) -> jax.Array:
        N, V = len(x_NxD), len(table_VxD)
        if choose(op, only_native(implementation), rows=N, dtype=dtype) == "xla":
            return reference.match(x_NxD, table_VxD)
        return native.call("match", [native.floats(N, V)], x_NxD.astype(jnp.float32), table_VxD)[0]

    matched = no_gradient(op, one_row(rows, num_shared=1))
    return jnp.vectorize(lambda x_D: matched(x_D, table_VxD), signature="(d)->(v)")(x_D)
