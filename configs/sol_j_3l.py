"""SOL-J-3L: three levels per axis, A = 27 joint actions (arXiv 2605.10875, appendix B).

    python -m sol_jax.train --config configs/sol_j_3l.py:cpu --workdir runs/3l

The paper does not list the levels; these are the ends of its budget ranges and one between.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.axes.kappa.levels = (0.1, 0.5, 1.0)
    config.axes.rho.levels = (0.4, 0.7, 1.0)
    config.axes.eta.levels = (5, 8, 16)
    return default.vary(config, variants)
