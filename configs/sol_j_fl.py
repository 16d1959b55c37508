"""SOL-J-FL: the full levels, A = 10 * 13 * 12 = 1,560 joint actions (arXiv 2605.10875, the authors' config).

python -m sol_jax.train --config configs/sol_j_fl.py:cpu --workdir runs/fl      # SmolLM2-135M
python -m sol_jax.train --config configs/sol_j_fl.py:1b --workdir runs/fl-1b    # a GPU or TPU
"""

from ml_collections import ConfigDict

from configs import default
from sol_jax.axes.config import full_levels


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.grpo.num_schedules = 32
    for name, axis in full_levels().each().items():
        config.axes[name].levels = axis.levels
    return default.vary(config, variants)
