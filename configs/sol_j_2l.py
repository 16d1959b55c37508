"""SOL-J-2L: two levels per axis, A = 8 joint actions (arXiv 2605.10875, appendix B).

    python -m sol_jax.train --config configs/sol_j_2l.py:cpu --workdir runs/2l

The paper does not list the levels; these are the ends of its budget ranges, which `default` has.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variants: str = "") -> ConfigDict:
    return default.get_config(variants)
