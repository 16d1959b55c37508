"""The policy's network as decoding runs it: one row at a time, by the CPU's kernels.

The network is the one that was trained.  Products differ by rounding; weights in bfloat16 differ by 2**-9,
which now and then changes an action whose two best scores are close.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels.linear import project
from sol_jax.rl.policy import Observation
from sol_jax.rl.rollout import Controller


def by_kernels(controller: Controller, kernels: str) -> Controller:
    """`controller` with the linear layers of its network by `kernels` (see `LlamaConfig`)."""

    def linear(layer: Any, args: Any, kwargs: Any, context: Any) -> jax.Array:
        module = context.module
        if not isinstance(module, nn.Dense) or context.method_name != "__call__" or len(args[0]) != 1:
            return layer(*args, **kwargs)
        y_1xF = project(args[0][0], [module.get_variable("params", "kernel")], kernels)[0][None]
        return y_1xF + module.get_variable("params", "bias") if module.use_bias else y_1xF

    def act(key: jax.Array, seen: Observation, memory: Any) -> tuple[jax.Array, jax.Array, Any]:
        with nn.intercept_methods(linear):
            return controller.act(key, seen, memory)

    return controller if kernels == "xla" else Controller(act, controller.memory)


def with_dtype(params: Any, dtype: str) -> Any:
    """Parameters of a policy with the matrices of its linear layers in `dtype`."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return jnp.asarray(leaf, dtype) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(cast, params)
