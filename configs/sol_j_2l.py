"""SOL-J-2L: two levels per axis, A = 8 joint actions (arXiv 2605.10875, the authors' config).

python -m sol_jax.train --config configs/sol_j_2l.py:cpu --workdir runs/2l
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.axes.kappa.page_size = 4
    config.axes.rho.levels = config.axes.rho.budget = (0.6, 1.0)
    config.eval.budgets = (
        (0.25, 0.65, 0.4),
        (0.4, 0.7, 0.5),
        (0.55, 0.8, 0.625),
        (0.7, 0.85, 0.75),
        (0.85, 0.95, 0.875),
    )
    return default.vary(config, variants)
