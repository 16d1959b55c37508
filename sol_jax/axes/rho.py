"""rho, structured activation pruning: only the largest channels of the MLP's input survive.

Source: sol.md section 2; arXiv 2605.10875 section 3.
"""

import dataclasses

import jax

from pallas_kernels.dispatch import without_triton
from pallas_kernels.prune import keep_channels, norm_prune
from sol_jax.axes.base import Axis, StepShape, Work, kept_count


@dataclasses.dataclass(frozen=True)
class ChannelPruning(Axis):
    """rho: the largest channels of the MLP's input survive."""

    name: str = dataclasses.field(default="rho", init=False)

    def nominal_cost(self, level: float) -> float:
        return level / max(self.levels)

    def mlp_input(self, value: jax.Array, x_D: jax.Array) -> jax.Array:
        return keep_channels(x_D, value, without_triton(self.kernels))

    def norm_mlp_input(self, value: jax.Array, x_D: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
        return norm_prune(x_D, gain_D, eps, value, without_triton(self.kernels)).x_D

    def shares(self, level: float, shape: StepShape) -> dict[str, Work]:
        share = kept_count(level, shape.hidden_size) / shape.hidden_size
        return {"gate_up": Work(share, share)}
