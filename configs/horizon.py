"""Horizon study (figure 3): A = 4 * 7 * 12 = 336 joint actions at T = 4, 16 and 64.

python -m sol_jax.train --config configs/horizon.py:cpu,t4 --workdir runs/horizon-t4
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.grpo.num_schedules = 32
    config.axes.kappa.levels = (0.1, 0.4, 0.7, 1.0)
    config.axes.rho.levels = (0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    config.axes.rho.budget = (0.45, 1.0)
    config.axes.eta.levels = tuple(range(5, 17))
    return default.vary(config, variants)
