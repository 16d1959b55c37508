"""The axes of a run.  A new axis is a file beside this one and a field here."""

import dataclasses
from typing import Literal

from sol_jax.axes.base import Axis, AxisConfig, AxisContext
from sol_jax.axes.eta import EtaConfig
from sol_jax.axes.kappa import KappaConfig
from sol_jax.axes.rho import RhoConfig
from sol_jax.options import Options, option, section

BudgetUnit = Literal["nominal", "bytes", "operations", "time"]


@dataclasses.dataclass(frozen=True)
class AxesConfig(Options):
    """The efficiency axes, in the order in which their levels make up an action."""

    where = "config.axes."
    budget_unit: BudgetUnit = option(
        "nominal", "what means must meet: keep rates, or the bytes, operations or time behind them"
    )
    prices: str = option(
        "", "a cost model (JSON, of experiments.benchmarks.roofline) for the unit time", path=True
    )
    kappa: KappaConfig = section(KappaConfig)
    rho: RhoConfig = section(RhoConfig)
    eta: EtaConfig = section(EtaConfig)

    def each(self) -> dict[str, AxisConfig]:
        """The axes' configs by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, AxisConfig)}

    def build(self, context: AxisContext) -> tuple[Axis, ...]:
        """The axes, with nominal costs."""
        return tuple(config.build(context) for config in self.each().values())


def full_levels() -> AxesConfig:
    """The paper's full levels (SOL-J-FL): 10 * 13 * 12 = 1,560 joint actions."""
    return AxesConfig(
        kappa=KappaConfig(levels=tuple(k / 10 for k in range(1, 11))),
        rho=RhoConfig(levels=tuple(r / 100 for r in range(40, 101, 5))),
        eta=EtaConfig(levels=tuple(range(5, 17))),
    )
