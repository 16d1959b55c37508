"""What a decode step really reads and computes: bytes and operations, beside the nominal keep rates.

For one sequence alone (batch 1), where decoding waits for memory: every weight and cache entry that a step
needs is read once.  Counted as a kernel that skips what the action drops would do it, whatever the kernel
in use does; left out are norms, softmax, activations within a layer and looked-up rows.  A multiplication
and an addition count as two operations, as in `flops`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cost_model import CostModel
from sol_jax.axes.base import ActionSpace, Axis, StepShape, Work
from sol_jax.axes.config import BudgetUnit
from sol_jax.models.llama import LlamaConfig
from sol_jax.rl.config import OneBudget
from sol_jax.rl.policy import Policy, PolicySpec, example_observation, initial_carry

NONE, WHOLE = Work(0.0, 0.0), Work(1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Bytes read and operations of one decode step, or of many, by part."""

    attention: Work = NONE  # weights of q, k, v and o
    gate_up: Work = NONE  # weights of the MLP's two input matrices
    down: Work = NONE  # and of its output matrix
    head: Work = NONE  # vocabulary logits
    cache: Work = NONE  # keys and values attended to
    mlp_output: Work = NONE  # read for the residual add; on one device rounding it (eta) saves nothing
    index: Work = NONE  # what is read to choose keys, such as the bounds of Quest's pages
    policy: Work = NONE
    refresh: Work = NONE  # the dense pass that ends an episode, spread over its steps

    @property
    def total(self) -> Work:
        parts = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return Work(sum(part.bytes for part in parts), sum(part.flops for part in parts))

    def __add__(self, other: "StepCost") -> "StepCost":
        names = [field.name for field in dataclasses.fields(self)]
        return StepCost(**{name: _sum(getattr(self, name), getattr(other, name)) for name in names})


def _sum(a: Work, b: Work) -> Work:
    return Work(a.bytes + b.bytes, a.flops + b.flops)


def _product(a: Work, b: Work) -> Work:
    return Work(a.bytes * b.bytes, a.flops * b.flops)


def dense_step(kv_len: int, cfg: LlamaConfig) -> StepCost:
    """A step without compression, `kv_len` keys in its reach."""
    L, D, F, item = cfg.num_layers, cfg.hidden_size, cfg.ffn_size, jnp.dtype(cfg.dtype).itemsize

    def matrices(numbers: int) -> Work:
        return Work(item * numbers, 2 * numbers)

    return StepCost(
        attention=matrices(L * D * cfg.head_size * 2 * (cfg.num_heads + cfg.num_kv_heads)),
        gate_up=matrices(L * 2 * D * F),
        down=matrices(L * F * D),
        head=matrices(D * cfg.vocab_size),
        cache=Work(
            item * L * 2 * cfg.num_kv_heads * cfg.head_size * kv_len,
            4 * L * cfg.num_heads * cfg.head_size * kv_len,
        ),
        mlp_output=Work(item * L * D, 0.0),
    )


def dense_pass(num_tokens: int, past: int, cfg: LlamaConfig, with_head: bool = False) -> Work:
    """A dense pass over `num_tokens` tokens after `past` others, as a KV refresh makes it.

    It reads the weights once.  `with_head`: also the logits at each token, by which drafts are checked.
    """
    step = dense_step(past + num_tokens, cfg)
    parts = [step.attention, step.gate_up, step.down, *([step.head] if with_head else [])]
    # Each token's keys: the past, and the new ones up to its own.
    keys = num_tokens * past + num_tokens * (num_tokens + 1) / 2
    attended = dense_step(1, cfg).cache.flops * keys
    flops = num_tokens * sum(part.flops for part in parts) + attended
    return Work(sum(part.bytes for part in parts) + step.cache.bytes, flops)


@functools.cache
def policy_step(cfg: PolicySpec) -> Work:
    """One step of the policy: all its matrices, float32; its own few keys are left out."""
    network = functools.partial(Policy(cfg).init, method="step")
    shapes = jax.eval_shape(network, jax.random.key(0), example_observation(cfg), initial_carry(cfg))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    numbers = sum(leaf.size for path, leaf in leaves if path[-1] == jax.tree_util.DictKey("kernel"))
    return Work(4.0 * numbers, 2.0 * numbers)


def step_cost(
    level_X: Sequence[float],
    kv_len: int,
    cfg: LlamaConfig,
    axes: Sequence[Axis],
    policy: PolicySpec | None = None,
    horizon: int = 0,
    step: int = 0,
) -> StepCost:
    """One decode step under an action.

    Args:
      level_X: the action's level of each axis (a row of `ActionSpace.values_AxX`).
      kv_len: keys in the step's reach, the current token's own included.
      policy: of the controller; None if it costs nothing.
      horizon: of the episodes whose end refreshes the cache; 0: nothing is refreshed.
      step: of the episode, from 0; with it the shares of an episode's steps add up to its refresh.
    """
    shape = _shape(kv_len, cfg)
    shares_X = [axis.shares(float(level), shape) for axis, level in zip(axes, level_X, strict=True)]
    parts = _compressed(dense_step(kv_len, cfg), axes, shares_X)
    if policy:
        parts["policy"] = policy_step(policy)
    if horizon:
        refresh = dense_pass(horizon, kv_len - 1 - step, cfg)
        parts["refresh"] = Work(refresh.bytes / horizon, refresh.flops / horizon)
    return StepCost(**parts)


def _shape(kv_len: int, cfg: LlamaConfig) -> StepShape:
    bits = 8 * jnp.dtype(cfg.dtype).itemsize
    return StepShape(kv_len, cfg.group_size, cfg.hidden_size, bits, cfg.num_layers)


def _compressed(
    dense: StepCost, axes: Sequence[Axis], shares_X: Sequence[Mapping[str, Work]]
) -> dict[str, Work]:
    """The parts of a step of which each axis leaves its `shares`; these may be numbers, or arrays alike."""
    whole = {field.name: getattr(dense, field.name) for field in dataclasses.fields(dense)}
    whole["index"] = dense.cache
    left = dict.fromkeys(whole, WHOLE) | {"index": NONE}
    for axis, shares in zip(axes, shares_X, strict=True):
        for name, share in shares.items():
            if name not in left:
                raise ValueError(f"axis {axis.name!r} names a part {name!r}; parts are {', '.join(left)}")
            # Savings multiply; what several axes read to choose by adds up.
            left[name] = (_sum if name == "index" else _product)(left[name], share)
    return {name: _product(whole[name], left[name]) for name in whole}


@functools.cache
def action_costs(space: ActionSpace, kv_len: int, cfg: LlamaConfig) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and operations of one decode step under every action, [A] each: the totals of `step_cost`.

    An axis is asked for its levels once, not for each of the actions that have them.
    """
    shape, sizes = _shape(kv_len, cfg), [len(axis.levels) for axis in space.axes]
    # Levels of axis x lie along dimension x, so the joint actions come of broadcasting.
    shares_X = [
        _level_shares(axis, shape, [-1 if y == x else 1 for y in range(len(sizes))])
        for x, axis in enumerate(space.axes)
    ]
    total: Any = StepCost(**_compressed(dense_step(kv_len, cfg), space.axes, shares_X)).total
    return np.broadcast_to(total.bytes, sizes).ravel(), np.broadcast_to(total.flops, sizes).ravel()


def _level_shares(axis: Axis, shape: StepShape, like: Sequence[int]) -> dict[str, Work]:
    """`axis.shares` of all its levels, each number an array of the dimensions `like`."""
    by_level = [axis.shares(float(level), shape) for level in axis.levels]
    stacked: dict[str, Any] = {}
    for name in dict.fromkeys(name for shares in by_level for name in shares):
        found = [shares.get(name, NONE if name == "index" else WHOLE) for shares in by_level]
        read, computed = (np.reshape(values, like) for values in zip(*found, strict=True))
        stacked[name] = Work(read, computed)  # type: ignore[arg-type]  # arrays in place of numbers
    return stacked


def level_costs(
    axis: Axis, unit: BudgetUnit, model: LlamaConfig, kv_len: int, prices: CostModel | None = None
) -> tuple[float, ...]:
    """Cost of each level of an axis, in the unit in which budgets are stated.

    "nominal" is the paper's: what `axis.cost` says.  The others are shares of what a *whole* step takes,
    other axes at their top, of what it takes with this axis at its top.  So costs of several axes add up,
    1 - sum(1 - cost) being the share of a joint action (but for what two axes save on one part), and an axis
    that saves nothing (as eta on one device) costs 1 at every level.

    Args:
      kv_len: keys in the step's reach.
      prices: of the device, for "time".
    """
    if unit == "nominal":
        return tuple(axis.nominal_cost(level) for level in axis.levels)
    if unit == "time" and prices is None:
        raise ValueError("costs in time need the prices of a device (a pallas_kernels.cost_model.CostModel)")
    if unit not in get_args(BudgetUnit):
        units = ", ".join(get_args(BudgetUnit))
        raise ValueError(f"the unit of budgets is {unit!r} and must be one of {units}")

    def of_step(level: float) -> float:
        total = step_cost((level,), kv_len, model, (axis,)).total
        if unit == "operations":
            return total.flops
        if prices is None or unit == "bytes":
            return total.bytes
        # The level is data of one program, which launches as much at any.
        return prices.seconds(*total, launches=prices.launches_per_layer * model.num_layers)

    top = of_step(axis.levels[-1])
    return tuple(of_step(level) / top for level in axis.levels)


def axis_shares(
    axes: Sequence[Axis], unit: OneBudget, model: LlamaConfig, kv_len: int, prices: CostModel | None = None
) -> tuple[float, ...]:
    """What a unit of each axis' cost is of a whole step, for one budget that is for all axes.

    A step costs 1 - sum(share * (1 - cost)): in "net" the mean of the axes' costs; in "bytes", "operations"
    and "time" the share of a dense step (but for what two axes save on one part).  Nothing for no unit.
    Arguments as of `level_costs`.
    """
    if not unit:
        return ()
    if unit == "net":
        return (1.0 / len(axes),) * len(axes)

    def share(axis: Axis) -> float:
        span = axis.cost(axis.levels[-1]) - axis.cost(axis.levels[0])
        # Choosing keys costs something, so that a short cache may be dearer to read in part.
        saved = max(0.0, 1.0 - level_costs(axis, unit, model, kv_len, prices)[0])
        return saved / span if span else 0.0

    return tuple(share(axis) for axis in axes)


def in_unit(
    axis: Axis, unit: BudgetUnit, model: LlamaConfig, kv_len: int, prices: CostModel | None = None
) -> Axis:
    """The axis with its budgets met in bytes or time instead of nominal keep rates.

    The costs of `level_costs`, stretched so that the ends keep their nominal costs: a mean of them meets a
    target exactly if the mean bytes (or time) meet theirs, and penalties, dead zone and what the policy sees
    keep their scale.  Budgets are still given as keep rates; mixing the two levels around one gives the cost
    it is translated to.  An axis that saves nothing costs its top at every level and is not budgeted.
    """
    if unit == "nominal" or len(axis.levels) == 1:
        return axis
    real = np.array(level_costs(axis, unit, model, kv_len, prices))
    nominal = np.array([axis.nominal_cost(level) for level in axis.levels])
    # Choosing keys costs something, so a level just below the top may cost more than it: charged as much.
    real = np.minimum(np.maximum.accumulate(real), real[-1])
    span = real[-1] - real[0]
    share = (real - real[0]) / span if span > 0 else np.ones(len(real))
    stretched = nominal[0] + share * (nominal[-1] - nominal[0])

    axis = dataclasses.replace(axis, level_costs=tuple(float(c) for c in stretched))
    low, high = (axis.budget_for(end) for end in axis.budget)
    choices = tuple(axis.budget_for(choice) for choice in axis.budget_choices)
    return dataclasses.replace(axis, budget=(low, high), budget_choices=choices)
