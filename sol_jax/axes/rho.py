"""rho, structured activation pruning: only the largest channels of the MLP's input survive.

Source: docs/method.md, "The three axes"; arXiv 2605.10875 section 3.
"""

import dataclasses
from typing import ClassVar

import jax

from pallas_kernels.dispatch import without_triton
from pallas_kernels.prune import keep_channels, norm_prune
from sol_jax.axes.base import Axis, AxisConfig, AxisContext, Effect, StepShape, Work, kept_count
from sol_jax.options import option


@dataclasses.dataclass(frozen=True)
class ChannelPruning(Axis):
    """rho: the largest channels of the MLP's input survive."""

    name: str = dataclasses.field(default="rho", init=False)
    effects: ClassVar[frozenset[Effect]] = frozenset({"mlp_input"})
    kept: ClassVar[str] = "the MLP's input channels"

    def nominal_cost(self, level: float) -> float:
        return level / max(self.levels)

    def mlp_input(self, value: jax.Array, x_D: jax.Array) -> jax.Array:
        return keep_channels(x_D, value, without_triton(self.kernels))

    def norm_mlp_input(self, value: jax.Array, x_D: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
        return norm_prune(x_D, gain_D, eps, value, without_triton(self.kernels)).x_D

    def shares(self, level: float, shape: StepShape) -> dict[str, Work]:
        share = kept_count(level, shape.hidden_size) / shape.hidden_size
        return {"gate_up": Work(share, share)}


@dataclasses.dataclass(frozen=True)
class RhoConfig(AxisConfig):
    """Which share of the MLP's input channels survives."""

    where = "config.axes.rho."
    levels: tuple[float, ...] = option((0.4, 1.0), "shares of the channels, ascending")
    budget: tuple[float, float] = option((0.4, 1.0), "range of the mean costs that training asks for")

    def axis(self, context: AxisContext) -> Axis:
        return ChannelPruning(**self.common(context))
