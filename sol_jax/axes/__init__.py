"""The efficiency axes: what an action sets, what it costs, and how it acts on one decode step.

`base` says what an axis is and joins several into an action space; `kappa`, `rho` and `eta` are the paper's
three, a file each; `key_selection` has the masks and the arithmetic of keys behind kappa.
"""

from sol_jax.axes.base import ActionSpace, Axis, StepShape, Work
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest, Recency, Relevancy
from sol_jax.axes.rho import ChannelPruning

__all__ = [
    "ActionSpace",
    "Axis",
    "ChannelPruning",
    "OutputQuantization",
    "Quest",
    "Recency",
    "Relevancy",
    "StepShape",
    "Work",
]
