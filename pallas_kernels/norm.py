"""RMSNorm (arXiv 1910.07467)."""

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x_D: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
    """Divides x by the root of its mean square over the last axis and multiplies by the gain, in float32."""
    return x_D * lax.rsqrt(jnp.mean(x_D * x_D, -1, keepdims=True) + eps) * gain_D.astype(jnp.float32)
