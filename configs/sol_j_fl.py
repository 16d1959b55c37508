"""SOL-J-FL: the full levels, A = 10 * 13 * 12 = 1,560 joint actions (arXiv 2605.10875, appendix B).

    python -m sol_jax.train --config configs/sol_j_fl.py:cpu --workdir runs/fl      # SmolLM2-135M
    python -m sol_jax.train --config configs/sol_j_fl.py:1b --workdir runs/fl-1b    # a GPU or TPU

The paper's 1B runs have K = 32 schedules: --config.grpo.num_schedules=32.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.axes.kappa.levels = tuple(k / 10 for k in range(1, 11))
    config.axes.rho.levels = tuple(r / 100 for r in range(40, 101, 5))
    config.axes.eta.levels = tuple(range(5, 17))
    return default.vary(config, variants)
