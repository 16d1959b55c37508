"""Row kernels: written for many rows at once, called with one.

`jax.vmap` of a kernel adds an axis to its grid, which a TPU walks serially, and hides from an op how many
rows it has, on which its strategy may depend.  `one_row` gathers the rows of every vmap around a call into
one axis instead.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap


def one_row(rows_fn: Callable[..., Any], num_shared: int = 0) -> Callable[..., Any]:
    """Returns the one-row view of `rows_fn`, whose arguments and results lead with rows [N, ...].

    The last `num_shared` arguments (weights) have no rows.  If a vmap batches those, its elements run one
    after another.
    """

    @custom_vmap
    def rows(*args: Any) -> Any:
        return rows_fn(*args)

    @rows.def_vmap
    def batched(axis_size: int, in_batched: list[bool], *args: Any) -> tuple[Any, Any]:
        first_shared = len(args) - num_shared
        if any(in_batched[first_shared:]):
            out = lax.map(
                lambda i: rows(*(a[i] if b else a for a, b in zip(args, in_batched, strict=True))),
                jnp.arange(axis_size),
            )
        else:
            own = (
                a if b else jnp.broadcast_to(a, (axis_size, *a.shape))
                for a, b in zip(args[:first_shared], in_batched, strict=False)
            )
            merged = (a.reshape(-1, *a.shape[2:]) for a in own)
            flat = rows(*merged, *args[first_shared:])
            out = jax.tree.map(lambda a: a.reshape(axis_size, -1, *a.shape[1:]), flat)
        return out, jax.tree.map(lambda _: True, out)

    def of_one(*args: Any) -> Any:
        first_shared = len(args) - num_shared
        lifted = (a[None] for a in args[:first_shared])
        return jax.tree.map(lambda a: a[0], rows(*lifted, *args[first_shared:]))

    return of_one
