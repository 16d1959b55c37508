"""Acting by predictions: what each level of each axis loses, against a price on its cost.

The head's scores give, for one step, a loss per level and axis that falls towards the dearest level, where it
is 0, and a rest that no level of this step can change (what earlier steps left in the cache).  Of each axis
the level is taken that has the least `loss + price * cost`.  `PRICES_M` are the prices tried; a table of
their mean costs turns a requested mean cost into a price.

Array -> array functions; `n` counts the levels of an axis, `M` prices.  Not the paper's.
Source: docs/method.md, "Learning from counterfactuals".
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Nats that a unit of cost is worth: from next to nothing to more than a token's whole likelihood.
PRICES_M = np.geomspace(1e-4, 30.0, 96)
# A fresh head predicts exp(-4) = 0.02 nats a level, as mild levels lose.
_FIRST = -4.0
_NEAR = 0.1  # of mean cost: wider than what one schedule's tokens differ by, narrow beside the whole range
_FAR = 1e-6
SOFTNESS = (
    0.02  # nats: by how much less an action must lose to be e times as likely where actions are sampled
)


def num_scores(counts: Sequence[int]) -> int:
    """Scores that the head must give for axes of so many levels."""
    return 1 + sum(count - 1 for count in counts)


def split_losses(scores: jax.Array, counts: Sequence[int]) -> tuple[jax.Array, list[jax.Array]]:
    """The rest [...] and each axis' losses [..., n], in nats, from scores [..., 1 + sum of n - 1].

    The exponential of a score is how much one level loses more than the next, so losses fall along an axis.
    """
    parts = jnp.exp(scores + _FIRST)
    stops = 1 + np.cumsum([count - 1 for count in counts])
    losses = []
    for count, stop in zip(counts, stops, strict=True):
        steps = parts[..., stop - (count - 1) : stop]
        sums = jnp.flip(jnp.cumsum(jnp.flip(steps, -1), -1), -1)
        losses.append(jnp.concatenate([sums, jnp.zeros_like(parts[..., :1])], -1))
    return parts[..., 0], losses


def mean_costs(loss_Nxn: jax.Array, cost_n: jax.Array, near_NxM: jax.Array) -> jax.Array:
    """Mean cost at each price of `PRICES_M` over N steps, [M]; it falls with the price.

    `near_NxM` is how much a step counts at a price.
    """

    def at(given: tuple[jax.Array, jax.Array]) -> jax.Array:
        price, near_N = given
        return jnp.average(cost_n[jnp.argmin(loss_Nxn + price * cost_n, -1)], weights=near_N)

    cost_M = jax.lax.map(at, (jnp.asarray(PRICES_M, jnp.float32), near_NxM.T))
    return jax.lax.cummin(cost_M)  # of other steps at each price it may rise a little


def nearness(asked_N: jax.Array, cost_M: jax.Array) -> jax.Array:
    """How much a step that was asked for a mean cost counts at each price, by what it buys so far, [N, M]."""
    away_NxM = (asked_N[:, None] - cost_M) / _NEAR
    return jnp.exp(-0.5 * away_NxM**2) + _FAR  # a price to which nothing is near counts what there is


def first_costs(cost_n: Sequence[float]) -> np.ndarray:
    """A table [M] before anything is known: from the dearest level evenly down to the cheapest."""
    return np.linspace(max(cost_n), min(cost_n), len(PRICES_M), dtype=np.float32)


def shared_price(asked: jax.Array, cost_XxM: jax.Array, share_X: jax.Array) -> jax.Array:
    """The price of a whole step at which steps cost `asked` on average, axis `x` paying `share_X[x]` of it.

    A step costs `total_cost`.  The table of each axis is read at its own part of the price.
    """
    log_price_M = jnp.asarray(np.log(PRICES_M), jnp.float32)

    def paid(cost_M: jax.Array, share: jax.Array) -> jax.Array:
        return jnp.interp(log_price_M + jnp.log(share), log_price_M, cost_M)

    return price_for(asked, total_cost(jax.vmap(paid)(cost_XxM, share_X).T, share_X))


def total_cost(cost_X: jax.Array, share_X: jax.Array) -> jax.Array:
    """What a step costs as a share of a dense one [...], from costs [..., X]: of `PolicySpec.axis_shares`."""
    return 1.0 - (1.0 - cost_X) @ share_X


def price_for(asked: jax.Array, cost_M: jax.Array) -> jax.Array:
    """The price at which steps cost `asked` on average, by a table of `mean_costs`."""
    falling_M = jnp.flip(cost_M)  # ascending, as interpolation needs
    return jnp.exp(jnp.interp(asked, falling_M, jnp.asarray(np.log(PRICES_M[::-1]), jnp.float32)))
