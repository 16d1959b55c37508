"""Axes that `vmap` adds to an op, folded into the two that its kernels know.

A kernel takes B sequences and, for each, K rows that read the same cache (schedules of a group, episodes of a
block).  A vmapped axis over which the cache is *not* batched makes more rows, and the cache is still read
once for all of them; any other makes more sequences.  A plain `vmap` of a kernel would read the cache once
per row, and would run a TPU kernel with scalar prefetch row by row.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def fold_rows(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the one-row view of `op(layer, shared, own)`.

    The op's arrays are [B, ...] in `shared` and [B, K, ...] in `own`.  The view takes and gives them without
    B and K, and may be vmapped any number of times.  `layer` says which of stacked layers to read; it is the
    same for all rows.  `name` is for errors.
    """

    @jax.custom_batching.custom_vmap
    def folded(layer: jax.Array, shared: Any, own: Any) -> Any:
        return op(layer, shared, own)

    @folded.def_vmap
    def fold(N: int, batched: Any, layer: jax.Array, shared: Any, own: Any) -> tuple[Any, Any]:
        layer_batched, shared_batched, own_batched = batched
        if layer_batched:
            raise ValueError(
                f"{name}: a kernel reads one layer for all rows, and here the layer is batched; "
                "loop over layers (jax.lax.map) or use 'xla' instead"
            )
        own = _spread(own, own_batched, N)
        if any(jax.tree.leaves(shared_batched)):
            shared = _spread(shared, shared_batched, N)
            out = folded(layer, _join(shared), _join(own))
            out = jax.tree.map(lambda x: x.reshape(N, -1, *x.shape[1:]), out)
        else:
            by_sequence = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), own)  # [B, N, K, ...]
            out = folded(layer, shared, _join(by_sequence, 1))
            out = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(len(x), N, -1, *x.shape[2:]), 1, 0), out)
        return out, jax.tree.map(lambda _: True, out)

    def of_one(layer: jax.Array, shared: Any, own: Any) -> Any:
        lifted = jax.tree.map(lambda x: x[None], shared), jax.tree.map(lambda x: x[None, None], own)
        return jax.tree.map(lambda x: x[0, 0], folded(layer, *lifted))

    return of_one


def _spread(tree: Any, batched: Any, N: int) -> Any:
    """Returns every leaf with the new axis, repeated where it has none."""
    return jax.tree.map(lambda x, b: x if b else jnp.broadcast_to(x, (N, *x.shape)), tree, batched)


def _join(tree: Any, axis: int = 0) -> Any:
    """Makes axes `axis` and `axis + 1` of every leaf one."""

    def join(x: jax.Array) -> jax.Array:
        size = math.prod(x.shape[axis : axis + 2])
        return x.reshape(*x.shape[:axis], size, *x.shape[axis + 2 :])

    return jax.tree.map(join, tree)
