"""The acceptance rule of self-speculative decoding: the compressed steps draft, the dense model checks.

The dense pass that refreshes the cache gives the dense distribution p at every drafted position.  A token
that was drawn from q is kept with probability min(1, p/q), and the first that is not is replaced by one of
the normalised max(p - q, 0); if all are kept, one more comes from p.  The tokens are then distributed as
the dense model's own.  Greedy choice is the case where p and q are certain of one token: the drafts stay as
long as they are the dense model's choice.

Source: speculative sampling (arXiv 2211.17192, 2302.01318); drafting with the compressed model itself as in
arXiv 2309.08168.  One row; batch with vmap.
"""

import jax
import jax.numpy as jnp

from sol_jax.generation.sampling import Sampling, draw


def accept(
    accept_key_N: jax.Array,
    replace_key_N: jax.Array,
    token_T: jax.Array,
    draft_TxV: jax.Array,
    dense_NxV: jax.Array,
    rule: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """How many of T drafted tokens stay, and the token that comes after those.

    Args:
      accept_key_N: random keys of the T + 1 positions for keeping a token, `replace_key_N` for its successor.
      token_T: drawn from `draft_TxV`.
      draft_TxV: log-probabilities q, -inf where a token could not come.
      dense_NxV: log-probabilities p at the same T positions and the one after.
      rule: by which the last token is drawn.
    """
    T = token_T.shape[0]
    t = jnp.arange(T)
    ratio_T = dense_NxV[t, token_T] - draft_TxV[t, token_T]
    lot_T = jnp.log(jax.vmap(jax.random.uniform)(accept_key_N[:T]))
    agreed = jnp.sum(jnp.cumprod((lot_T < ratio_T).astype(jnp.int32)))
    # Past the last draft nothing was drafted: q is 0 there.
    draft_NxV = jnp.concatenate([draft_TxV, jnp.full_like(draft_TxV[:1], -jnp.inf)])
    token = draw(replace_key_N[agreed], residual(dense_NxV[agreed], draft_NxV[agreed]), rule)
    return agreed, token


def residual(dense_V: jax.Array, draft_V: jax.Array) -> jax.Array:
    """Log of max(p - q, 0), not normalised; p itself where rounding leaves nothing."""
    rest_V = jnp.maximum(jnp.exp(dense_V) - jnp.exp(draft_V), 0.0)
    return jnp.where(jnp.sum(rest_V) > 0, jnp.log(rest_V), dense_V)
