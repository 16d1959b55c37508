"""Spending a mean cost over many steps: by what they are predicted to lose, or blindly.

Array -> array functions.  `N` counts steps, `A` their choices, all at one price for the whole text.
"""

from collections.abc import Sequence

import numpy as np

from sol_jax.axes.base import Axis
from sol_jax.baselines.schedules import mix


def allocate(loss_NxA: np.ndarray, cost: np.ndarray, target: float) -> np.ndarray:
    """Each step's choice of the least loss plus price times cost [N], at the price of the mean cost `target`.

    `cost` is [A], or [N, A] where steps have choices of their own.  Beyond what prices reach it is the end.
    """

    def chosen(price: float) -> np.ndarray:
        return np.argmin(loss_NxA + price * cost, -1)

    low, high = 1e-7, 1e4
    for _ in range(60):
        price = float(np.sqrt(low * high))
        spent = taken(np.broadcast_to(cost, loss_NxA.shape), chosen(price)).mean()
        low, high = (price, high) if spent > target else (low, price)
    return chosen(high)


def taken(value_NxA: np.ndarray, chosen_N: np.ndarray) -> np.ndarray:
    """What each step has of its choice, [N]."""
    return np.take_along_axis(value_NxA, chosen_N[:, None], -1)[:, 0]


def fixed_mix(value_NxA: np.ndarray, axis: Axis, target: float) -> np.ndarray:
    """What each step has on average under the two levels around `target`, mixed to meet it, [N]."""
    low, high, share = mix(axis, target)
    return (1 - share) * value_NxA[:, low] + share * value_NxA[:, high]


def additive_means(loss_NxK: np.ndarray, level_NxKxX: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """The blind prediction of joint actions [N, K]: what each axis' level loses on average, added up."""
    X = len(counts)
    columns = [level_NxKxX[..., x, None] == np.arange(counts[x] - 1) for x in range(X)]
    design = np.concatenate([np.ones((*loss_NxK.shape, 1), bool), *columns], -1).reshape(loss_NxK.size, -1)
    weights = np.linalg.lstsq(design.astype(np.float32), loss_NxK.reshape(-1), rcond=None)[0]
    return (design @ weights).reshape(loss_NxK.shape)


class Ridge:
    """Ridge regression of log losses at every level on standardised features.

    `floor` (nats) is added to losses before the logarithm; `strength` is the penalty.
    """

    def __init__(
        self, feature_NxF: np.ndarray, loss_NxA: np.ndarray, strength: float = 3000.0, floor: float = 0.02
    ):
        self._floor, target_NxA = floor, np.log(loss_NxA + floor)
        self._shift, self._scale = feature_NxF.mean(0), feature_NxF.std(0) + 1e-6
        x_NxF = self._standard(feature_NxF)
        self._mean = target_NxA.mean(0)
        gram = x_NxF.T @ x_NxF + strength * np.eye(x_NxF.shape[1], dtype=x_NxF.dtype)
        self._weight = np.linalg.solve(gram, x_NxF.T @ (target_NxA - self._mean))

    def predict(self, feature_NxF: np.ndarray) -> np.ndarray:
        """Losses [N, A] in nats, up to the floor."""
        return np.exp(self._standard(feature_NxF) @ self._weight + self._mean)

    def _standard(self, feature_NxF: np.ndarray) -> np.ndarray:
        return ((feature_NxF - self._shift) / self._scale).astype(np.float32)
