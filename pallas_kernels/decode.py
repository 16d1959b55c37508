"""Attention of one decode step over a shared prefix and a schedule's own suffix."""

import jax
import jax.numpy as jnp


def split_attention(
    q_HxGxd: jax.Array,
    prefix: tuple[jax.Array, jax.Array],
    suffix: tuple[jax.Array, jax.Array],
    keep_prefix_HxGxS: jax.Array,
    keep_suffix_HxGxT: jax.Array,
) -> jax.Array:
    """Softmax attention over the kept entries of two caches: [H, G, d], float32.

    The caches are k and v of [H, S, d] and of [H, T, d]; `H` counts key/value heads and `G` the query heads
    of each; masks broadcast over H and G.  Vmapped over schedules with the prefix unbatched, the schedules
    become rows of one matrix product: the prefix is read once for all of them and never copied.
    """
    (k_HxSxd, v_HxSxd), (k_HxTxd, v_HxTxd) = prefix, suffix

    def logits(k_HxNxd: jax.Array, keep: jax.Array) -> jax.Array:
        logit = jnp.einsum("hgd,hnd->hgn", q_HxGxd, k_HxNxd, preferred_element_type=jnp.float32)
        return jnp.where(keep, logit * q_HxGxd.shape[-1] ** -0.5, -jnp.inf)

    def mix(weight: jax.Array, v_HxNxd: jax.Array) -> jax.Array:
        cast = weight.astype(v_HxNxd.dtype)
        return jnp.einsum("hgn,hnd->hgd", cast, v_HxNxd, preferred_element_type=jnp.float32)

    logit_S, logit_T = logits(k_HxSxd, keep_prefix_HxGxS), logits(k_HxTxd, keep_suffix_HxGxT)
    top = jnp.maximum(jnp.max(logit_S, -1, keepdims=True), jnp.max(logit_T, -1, keepdims=True))
    weight_S, weight_T = jnp.exp(logit_S - top), jnp.exp(logit_T - top)
    total = jnp.sum(weight_S, -1, keepdims=True) + jnp.sum(weight_T, -1, keepdims=True)
    return (mix(weight_S, v_HxSxd) + mix(weight_T, v_HxTxd)) / total
