"""Dense causal attention over a whole sequence, for prefill.  It is XLA's: there is no kernel of it."""

import jax
import jax.numpy as jnp
from jax import lax

# On the CPU queries come in blocks of this size.  The scores of a block and head stay in the second-level
# cache, and a block never touches the keys after it, so small blocks do little more than half of the full
# square; long sequences take larger ones, for at most MAX_BLOCKS of them are unrolled.
CPU_BLOCK, MAX_BLOCKS = 128, 16


def causal_attention(q_SxHxd: jax.Array, k_HkvxSxd: jax.Array, v_HkvxSxd: jax.Array) -> jax.Array:
    """Returns softmax attention of each query over the keys up to its own position: [S, H, d], float32."""
    return lax.platform_dependent(
        q_SxHxd, k_HkvxSxd, v_HkvxSxd, cpu=_blocked_attention, default=_library_attention
    )


def _library_attention(q_SxHxd: jax.Array, k_HkvxSxd: jax.Array, v_HkvxSxd: jax.Array) -> jax.Array:
    k_SxHkvxd, v_SxHkvxd = k_HkvxSxd.swapaxes(0, 1), v_HkvxSxd.swapaxes(0, 1)
    return jax.nn.dot_product_attention(q_SxHxd, k_SxHkvxd, v_SxHkvxd, is_causal=True).astype(jnp.float32)


def _blocked_attention(q_SxHxd: jax.Array, k_HkvxSxd: jax.Array, v_HkvxSxd: jax.Array) -> jax.Array:
    S, H, d = q_SxHxd.shape
    Hkv = k_HkvxSxd.shape[0]
    q_HkvxGxSxd = q_SxHxd.reshape(S, Hkv, H // Hkv, d).transpose(1, 2, 0, 3)

    def block(q_GxNxd: jax.Array, k_Mxd: jax.Array, v_Mxd: jax.Array) -> jax.Array:
        N, M = q_GxNxd.shape[1], k_Mxd.shape[0]
        logit = jnp.einsum("gnd,md->gnm", q_GxNxd, k_Mxd, preferred_element_type=jnp.float32) * d**-0.5
        seen_NxM = jnp.arange(M) <= jnp.arange(M - N, M)[:, None]
        weight = jnp.exp(logit - jnp.max(jnp.where(seen_NxM, logit, -jnp.inf), -1, keepdims=True))
        weight = jnp.where(seen_NxM, weight, 0.0)
        mixed = jnp.einsum(
            "gnm,md->gnd", weight.astype(v_Mxd.dtype), v_Mxd, preferred_element_type=jnp.float32
        )
        return mixed / jnp.sum(weight, -1, keepdims=True)

    def head(qkv: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_GxSxd, k_Sxd, v_Sxd = qkv
        size = CPU_BLOCK * max(1, -(-S // (CPU_BLOCK * MAX_BLOCKS)))
        starts = range(0, S, size)
        ends = [min(start + size, S) for start in starts]
        return jnp.concatenate(
            [block(q_GxSxd[:, a:b], k_Sxd[:b], v_Sxd[:b]) for a, b in zip(starts, ends, strict=True)], 1
        )

    mixed_HkvxGxSxd = lax.map(head, (q_HkvxGxSxd, k_HkvxSxd, v_HkvxSxd))
    return mixed_HkvxGxSxd.transpose(2, 0, 1, 3).reshape(S, H, d)
