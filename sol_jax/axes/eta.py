"""eta, activation quantisation: the MLP's output is rounded to a number of bits before the residual add.

Source: docs/method.md, "The three axes"; arXiv 2605.10875 section 3.
"""

import dataclasses
from typing import ClassVar

import jax

from pallas_kernels.dispatch import without_triton
from pallas_kernels.quantize import MAX_BITS, fake_quantize, quantize_residual
from sol_jax.axes.base import Axis, AxisConfig, AxisContext, Effect
from sol_jax.options import option


@dataclasses.dataclass(frozen=True)
class OutputQuantization(Axis):
    """q: the MLP's output is rounded to q bits; its cost is eta = q / 16.

    On one device that saves nothing (`shares` names no part): the output never leaves the chip's registers
    before the residual add.  Fewer bits would pay where outputs are sent between devices.
    """

    full: ClassVar[float] = MAX_BITS
    name: str = dataclasses.field(default="eta", init=False)
    effects: ClassVar[frozenset[Effect]] = frozenset({"mlp_output"})
    kept: ClassVar[str] = "the MLP's output bits"

    def nominal_cost(self, level: float) -> float:
        return level / MAX_BITS

    def mlp_output(self, value: jax.Array, y_D: jax.Array) -> jax.Array:
        return fake_quantize(y_D, value, without_triton(self.kernels))

    def mlp_output_norm(
        self, value: jax.Array, y_D: jax.Array, x_D: jax.Array, gain_D: jax.Array, eps: float
    ) -> tuple[jax.Array, jax.Array]:
        return quantize_residual(y_D, value, x_D, gain_D, eps, without_triton(self.kernels))


@dataclasses.dataclass(frozen=True)
class EtaConfig(AxisConfig):
    """How many bits the MLP's output keeps."""

    where = "config.axes.eta."
    levels: tuple[float, ...] = option((5, 16), "bits, ascending; 16 does not round")
    budget: tuple[float, float] = option((0.3125, 1.0), "range of the mean costs that training asks for")
    penalty: float = option(200.0, "alpha: weight of a missed budget", at_least=0)

    def axis(self, context: AxisContext) -> Axis:
        return OutputQuantization(**self.common(context))

    def check_levels(self) -> None:
        if not all(2 <= bits <= MAX_BITS and int(bits) == bits for bits in self.levels):
            raise self.wrong("levels", "whole numbers of bits from 2 to 16")
