"""The flags of `sol_jax.plan`."""

import dataclasses

from sol_jax.options import Options, option
from sol_jax.planning.topology import EXAMPLES


@dataclasses.dataclass(frozen=True)
class PlanOptions(Options):
    """Which machines a config is planned for, besides `--config`."""

    where = "--"
    topology: str = option("", f"machines: {EXAMPLES}")
    compile: bool = option(True, "compile for TPUs, which takes minutes; if not, arithmetic alone")
