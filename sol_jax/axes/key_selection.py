"""Which keys a decode step may attend to and which it does, and the arithmetic of how many.

Source: docs/method.md, "The three axes".  `H` counts key/value heads here and `G` the query heads of each.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KeysInReach(NamedTuple):
    """The keys a decode step may attend to: the shared prefix, then the schedule's own, the current last.

    `prefix_HxSxd` may be longer than `prefix_len`; `suffix_HxTxd` is filled up to and including `step`.
    """

    prefix_HxSxd: jax.Array
    suffix_HxTxd: jax.Array
    prefix_len: jax.Array
    step: jax.Array

    @property
    def kv_len(self) -> jax.Array:
        """Keys in reach, the current token's own included."""
        return self.prefix_len + self.step + 1

    @property
    def positions(self) -> tuple[jax.Array, jax.Array]:
        """Position in the text of each prefix and suffix entry: [S], [T]."""
        S, T = self.prefix_HxSxd.shape[1], self.suffix_HxTxd.shape[1]
        return jnp.arange(S), self.prefix_len + jnp.arange(T)

    @property
    def valid(self) -> "Selection":
        """Every key in reach: masks [1, 1, S] and [1, 1, T]."""
        S, T = self.prefix_HxSxd.shape[1], self.suffix_HxTxd.shape[1]
        prefix_S, suffix_T = jnp.arange(S) < self.prefix_len, jnp.arange(T) <= self.step
        return Selection(prefix_S[None, None], suffix_T[None, None])


class Selection(NamedTuple):
    """Which keys a step attends to: masks that broadcast to [H, G, P] and [H, G, T].

    The prefix' is by page of `page_size` consecutive positions, the suffix' by position.
    """

    prefix: jax.Array
    suffix: jax.Array
    page_size: int = 1

    def by_token(self, prefix_len: int) -> "Selection":
        """The same with pages of one position, for a prefix (its room, not its filled part) so long."""
        return Selection(jnp.repeat(self.prefix, self.page_size, -1)[..., :prefix_len], self.suffix)

    def both(self, other: "Selection", prefix_len: int) -> "Selection":
        """The keys that are in both."""
        a, b = self, other
        if a.page_size != b.page_size:
            a, b = a.by_token(prefix_len), b.by_token(prefix_len)
        return Selection(a.prefix & b.prefix, a.suffix & b.suffix, a.page_size)


def ends(keys: KeysInReach, sinks: int, recent: int | jax.Array) -> Selection:
    """The first `sinks` and the last `recent` keys in reach."""
    prefix_S, suffix_T = ((p < sinks) | (p >= keys.kv_len - recent) for p in keys.positions)
    return Selection(prefix_S[None, None], suffix_T[None, None])


def float32_ceil(fraction: jax.Array, count: jax.Array) -> jax.Array:
    """`ceil(f32(fraction) * f32(count))` as int32: the arithmetic of token budgets."""
    return jnp.ceil(jnp.float32(fraction) * jnp.asarray(count).astype(jnp.float32)).astype(jnp.int32)


def exact_ceil(fraction: jax.Array, count: jax.Array) -> jax.Array:
    """`ceil(f32(fraction) * count)` without rounding the product, for fraction in [2**-6, 1], count < 2**17.

    The authors' recency mask multiplies in Python, in double precision, so 0.1 * 10 is a little above 1
    there.  No float64 on accelerators: the product is taken in integers, in units of 2**-29.
    """
    # Exact: a power of two scales without rounding.
    unit = (jnp.float32(fraction) * 2.0**29).astype(jnp.uint32)
    high, low = unit >> 15, unit & 0x7FFF
    count = jnp.asarray(count).astype(jnp.uint32)
    low_product = low * count
    quotient = high * count + (low_product >> 15)
    remainder = (quotient & 0x3FFF) | (low_product & 0x7FFF)
    return ((quotient >> 14) + (remainder > 0)).astype(jnp.int32)
