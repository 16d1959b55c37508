"""What an axis attends to, as one mask over all keys; shared by the tests of the axes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sol_jax.axes.base import Axis
from sol_jax.axes.key_selection import KeysInReach

_GARBAGE = 1e3  # in cache entries that are not filled: any use of them shows


@functools.partial(jax.jit, static_argnames="axis")
def attended(
    axis: Axis, value: Any, q_HxGxd: jax.Array, k_HxNxd: jax.Array, num_keys: Any, prefix_len: Any
) -> jax.Array:
    """Mask [H, G, N] of the keys that one decode step reads under the level `value`.

    Of the first `num_keys` (the last of them the current token's) the first `prefix_len` are the prefix and
    the others the schedule's own, indexed token by token.  Both caches have room for N entries.
    """
    N, last = k_HxNxd.shape[1], num_keys - prefix_len - 1
    position_N = jnp.arange(N)[:, None]
    prefix_HxNxd = jnp.where(position_N < prefix_len, k_HxNxd, _GARBAGE)
    suffix_HxNxd = jnp.where(position_N <= last, jnp.roll(k_HxNxd, -prefix_len, 1), _GARBAGE)

    keys = KeysInReach(prefix_HxNxd, suffix_HxNxd, jnp.int32(prefix_len), jnp.int32(0))
    prefix_index = axis.index_prefix(prefix_HxNxd)

    def add(step: jax.Array, suffix_index: Any) -> Any:
        return axis.index_token(suffix_index, suffix_HxNxd[:, step], keys._replace(step=step))

    suffix_index = lax.fori_loop(0, last + 1, add, axis.index_suffix(prefix_index, keys))
    keys = keys._replace(step=last)
    keep = axis.select(jnp.float32(value), q_HxGxd, keys, prefix_index, suffix_index).both(keys.valid, N)
    prefix_mask, suffix_mask = (jnp.broadcast_to(m, (*q_HxGxd.shape[:2], N)) for m in keep[:2])
    return jnp.where(jnp.arange(N) < prefix_len, prefix_mask, jnp.roll(suffix_mask, prefix_len, -1))
