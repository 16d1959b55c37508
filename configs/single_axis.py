"""Single-axis controllers with two levels (figure 11): the axis and its lower level are the first variant.

    python -m sol_jax.train --config configs/single_axis.py:kappa-0.2,cpu --workdir runs/kappa-0.2

Variants: kappa-0.1, kappa-0.2, kappa-0.4, rho-0.3, rho-0.4, rho-0.5, eta-5-10, eta-5-16, eta-6-16.
"""

from ml_collections import ConfigDict

from configs import default

LEVELS = {
    "kappa-0.1": ("kappa", (0.1, 1.0)),
    "kappa-0.2": ("kappa", (0.2, 1.0)),
    "kappa-0.4": ("kappa", (0.4, 1.0)),
    "rho-0.3": ("rho", (0.3, 1.0)),
    "rho-0.4": ("rho", (0.4, 1.0)),
    "rho-0.5": ("rho", (0.5, 1.0)),
    "eta-5-10": ("eta", (5, 10)),
    "eta-5-16": ("eta", (5, 16)),
    "eta-6-16": ("eta", (6, 16)),
}
SHARES = (
    0.1,
    0.3,
    0.5,
    0.7,
    0.9,
)  # evaluated budgets, as shares of the way from the lower to the higher cost


def get_config(variants: str = "kappa-0.1") -> ConfigDict:
    name, _, rest = variants.partition(",")
    if name not in LEVELS:
        raise ValueError(
            f"{name!r} is no single-axis set; the first variant must be one of {', '.join(LEVELS)}"
        )
    chosen, levels = LEVELS[name]
    config = default.get_config()
    full = {"kappa": 1.0, "rho": 1.0, "eta": 16}
    for axis, top in full.items():
        config.axes[axis].levels = (top,)
    config.axes.kappa.page_size = 4
    config.axes[chosen].levels = levels
    low, high = (level / full[chosen] for level in levels)
    config.axes[chosen].budget = (low, high)
    asked = [low + share * (high - low) for share in SHARES]
    config.eval.budgets = tuple(tuple(c if a == chosen else 1.0 for a in full) for c in asked)
    return default.vary(config, rest)
