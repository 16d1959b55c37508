"""SOL-J-3L: three levels per axis, A = 27 joint actions (arXiv 2605.10875, the authors' config).

python -m sol_jax.train --config configs/sol_j_3l.py:cpu --workdir runs/3l
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.axes.kappa.page_size = 4
    config.axes.kappa.levels = (0.1, 0.6, 1.0)
    config.axes.rho.levels = (0.4, 0.8, 1.0)
    config.axes.eta.levels = (5, 7, 16)
    return default.vary(config, variants)
