"""The next token from logits: greedy, or sampled at a temperature from the top-k or the nucleus.

All rules turn logits into log-probabilities with -inf where a token may not come, so that what is drawn,
and what lossless generation compares, is one distribution (greedy: certainty).  One row; batch with vmap.

Sources: top-k (arXiv 1805.04833), nucleus (arXiv 1904.09751); applied in the order temperature, top-k, top-p.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.topk import at_least_kth


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0  # of the k most likely tokens; 0: of all
    top_p: float = 1.0  # of the smallest set of most likely tokens that has this much probability

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


GREEDY = Sampling()
# Smaller numbers than this are 0 to XLA.
SMALLEST = float(np.finfo(np.float32).tiny)
# Stands for a token where the model's logits are no numbers; `generation.engine` says so and ends.
NO_TOKEN = -1


def nucleus(prob_V: jax.Array, mass: float) -> jax.Array:
    """Mask of the smallest set of most likely tokens with at least `mass`; ties with its last are in it.

    Bisects the bits of the least probability in the set, like `pallas_kernels.topk`: no sort.
    """
    mass = max(mass, SMALLEST)
    bits_V = lax.bitcast_convert_type(prob_V.astype(jnp.float32), jnp.int32)  # ordered, as none is negative

    def set_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold | (jnp.int32(1) << (30 - i))
        return jnp.where(jnp.sum(jnp.where(bits_V >= higher, prob_V, 0.0)) >= mass, higher, threshold)

    return bits_V >= lax.fori_loop(0, 31, set_bit, jnp.int32(0))


def token_logp(logits_V: jax.Array, rule: Sampling) -> jax.Array:
    """Log-probability of each token under `rule`; -inf for those that cannot come."""
    if rule.temperature == 0:
        return jnp.where(jnp.arange(logits_V.shape[0]) == jnp.argmax(logits_V), 0.0, -jnp.inf)
    if rule.temperature != 1:
        # The largest becomes 0 first, which any temperature leaves as it is; others may go to -inf.
        logits_V = (logits_V - jnp.max(logits_V)) / max(rule.temperature, SMALLEST)
    if 0 < rule.top_k < logits_V.shape[0]:
        logits_V = jnp.where(at_least_kth(logits_V, jnp.int32(rule.top_k)), logits_V, -jnp.inf)
    if rule.top_p < 1:
        logits_V = jnp.where(nucleus(jax.nn.softmax(logits_V), rule.top_p), logits_V, -jnp.inf)
    return jax.nn.log_softmax(logits_V)


def finite(token: jax.Array, *numbers: jax.Array) -> jax.Array:
    """`token`, or `NO_TOKEN` if one of the numbers behind it is a NaN or an infinity."""
    return jnp.where(jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in numbers])), token, NO_TOKEN)


def draw(key: jax.Array, logp_V: jax.Array, rule: Sampling) -> jax.Array:
    """A token of the distribution that `token_logp` gave, int32."""
    # Certainty needs no random numbers, and V of them a row cost as much as a small model's layer.
    chosen = jnp.argmax(logp_V) if rule.temperature == 0 else jax.random.categorical(key, logp_V)
    return chosen.astype(jnp.int32)
