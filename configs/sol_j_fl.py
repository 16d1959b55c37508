"""SOL-J-FL: the full levels, A = 10 * 13 * 12 = 1,560 joint actions (arXiv 2605.10875, the authors' config).

    python -m sol_jax.train --config configs/sol_j_fl.py:cpu --workdir runs/fl      # SmolLM2-135M
    python -m sol_jax.train --config configs/sol_j_fl.py:1b --workdir runs/fl-1b    # a GPU or TPU

The variants `kappa`, `rho` and `eta` come first and keep the other axes dense:

    python -m sol_jax.train --config configs/sol_j_fl.py:rho,fast,cpu --workdir runs/rho
"""

from ml_collections import ConfigDict

from configs import default
from sol_jax.axes.config import full_levels

# Requested mean costs of an axis that has the step to itself.
ALONE = {
    "kappa": (0.25, 0.4, 0.55, 0.7, 0.85),
    "rho": (0.45, 0.5, 0.55, 0.6, 0.7),
    "eta": (0.4, 0.45, 0.5, 0.6),
}


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.grpo.num_schedules = 32
    for name, axis in full_levels().each().items():
        config.axes[name].levels = axis.levels
    return default.vary(config, alone(config, variants))


def alone(config: ConfigDict, variants: str) -> str:
    """Leaves the choice of one axis' level, if the first variant is one; returns the other variants."""
    chosen, _, rest = variants.partition(",")
    if chosen not in ALONE:
        return variants
    for axis in ALONE:
        if axis != chosen:
            config.axes[axis].levels = config.axes[axis].levels[-1:]
    asked = (tuple(cost if axis == chosen else 1.0 for axis in ALONE) for cost in ALONE[chosen])
    config.eval.budgets = tuple(asked)
    return rest
