"""What an efficiency axis is, and the joint actions of several.

An axis has levels, a cost per level (the unit budgets are stated in), a penalty weight, and effects on
one decode step of one schedule.  It declares which effects it has, and overrides only their methods; neither
the trainer nor the rollout names an axis.  `AxisConfig` is what a config file says of one.

Source: docs/method.md, "The three axes"; arXiv 2605.10875 section 3.  `H` counts key/value heads here and `G`
the query heads of each.
"""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.norm import rms_norm
from sol_jax.axes.key_selection import KeysInReach, Selection
from sol_jax.errors import UserError
from sol_jax.options import Options, option


class Work(NamedTuple):
    """Bytes read and floating-point operations of a part of a decode step, or shares of them."""

    bytes: float
    flops: float


class StepShape(NamedTuple):
    """What an axis must know of a decode step to say what it saves."""

    kv_len: int
    group_size: int  # query heads of each key/value head
    hidden_size: int
    dtype_bits: int  # of weights, caches and activations
    num_layers: int = 1


Effect = Literal["keys", "mlp_input", "mlp_output"]
# The methods by which an axis acts on each part of a step.
METHODS: dict[Effect, tuple[str, ...]] = {
    "keys": ("select",),
    "mlp_input": ("mlp_input", "norm_mlp_input"),
    "mlp_output": ("mlp_output", "mlp_output_norm"),
}


@dataclasses.dataclass(frozen=True)
class Axis:
    """One efficiency axis: `levels` ascending, the last the most expensive.

    Training draws the requested mean cost from the range `budget`, or from `budget_choices` if there are
    any; both are in units of `cost`.  All `value`s below are one of the levels, as a traced float32 scalar.
    """

    levels: tuple[float, ...]
    budget: tuple[float, float]
    penalty: float
    budget_choices: tuple[float, ...] = ()
    kernels: str = "auto"  # which implementation of its operations: see `llama.LlamaConfig.kernels`
    level_costs: tuple[float, ...] = ()  # in another unit than the paper's; empty: `nominal_cost`
    name: str = dataclasses.field(default="", init=False)
    full: ClassVar[float] = 1.0  # the level that changes nothing
    kept: ClassVar[str] = ""  # what a step uses a share of, for people who do not know the name
    rule: ClassVar[str] = ""  # which of several ways to act by the same levels
    effects: ClassVar[frozenset[Effect]] = frozenset()  # where it acts; other parts of a step pass it by

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for effect, methods in METHODS.items():
            undeclared = [name for name in methods if name in cls.__dict__ and effect not in cls.effects]
            if undeclared:
                raise TypeError(
                    f"{cls.__name__} has a method {undeclared[0]}, which is called only for axes that "
                    f"declare it; add {effect!r} to its `effects`"
                )

    @property
    def idle(self) -> bool:
        """Whether steps need not know of it: it has no level but the full one."""
        return self.levels == (self.full,)

    @property
    def penalty_weight(self) -> float:
        """alpha of the paper; an axis without a choice cannot miss its budget."""
        return self.penalty if self.cost(self.levels[0]) != self.cost(self.levels[-1]) else 0.0

    def cost(self, level: float) -> float:
        """Cost of a level, in the unit in which budgets are stated."""
        return self.level_costs[self.levels.index(level)] if self.level_costs else self.nominal_cost(level)

    def nominal_cost(self, level: float) -> float:
        """The paper's cost of a level, as a share of the full one."""
        return level

    def budget_for(self, keep_rate: float) -> float:
        """The mean cost of mixing the two levels around a nominal mean cost to meet it."""
        if not self.level_costs:
            return keep_rate
        nominal = [self.nominal_cost(level) for level in self.levels]
        return float(np.interp(keep_rate, nominal, self.level_costs))

    def identity(self) -> dict[str, Any]:
        """All that decides what the axis' levels do, for names of stored scores: never the class' name."""
        own = dataclasses.asdict(self)
        free = {"budget", "budget_choices", "penalty", "kernels", "level_costs"}
        return {"rule": self.rule} | {name: value for name, value in own.items() if name not in free}

    def index_prefix(self, k_HxSxd: jax.Array) -> Any:
        """What to remember of a prefix' keys (one layer), computed once for all schedules."""
        return ()

    def update_prefix(self, index: Any, k_HxSxd: jax.Array, start: jax.Array, count: int) -> Any:
        """`index_prefix` of keys of which only `count` from `start` on differ from those of `index`."""
        return self.index_prefix(k_HxSxd)

    def index_suffix(self, prefix_index: Any, keys: KeysInReach) -> Any:
        """The same for a schedule's own keys, before its first step (`keys.suffix_HxTxd` unused)."""
        return ()

    def index_token(self, suffix_index: Any, k_Hxd: jax.Array, keys: KeysInReach) -> Any:
        """`suffix_index` once the current token's key is there."""
        return suffix_index

    def select(
        self,
        value: jax.Array,
        q_HxGxd: jax.Array,
        keys: KeysInReach,
        prefix_index: Any,
        suffix_index: Any,
        layer: jax.Array | None = None,
    ) -> Selection:
        """The keys that attention reads; asked only of axes that declare the effect "keys".

        With `layer`, `prefix_index` is that of all layers, of which one is read in place: a slice of it would
        be copied before a kernel sees it.
        """
        return keys.valid

    def mlp_input(self, value: jax.Array, x_D: jax.Array) -> jax.Array:
        """Acts on the MLP's (normed) input."""
        return x_D

    def mlp_output(self, value: jax.Array, y_D: jax.Array) -> jax.Array:
        """Acts on the MLP's output, before the residual add."""
        return y_D

    def norm_mlp_input(self, value: jax.Array, x_D: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
        """RMSNorm, then `mlp_input`: for an axis that does both in one pass."""
        return self.mlp_input(value, rms_norm(x_D, gain_D, eps))

    def mlp_output_norm(
        self, value: jax.Array, y_D: jax.Array, x_D: jax.Array, gain_D: jax.Array, eps: float
    ) -> tuple[jax.Array, jax.Array]:
        """`mlp_output` added to the residual stream x_D, and the RMSNorm of that: likewise."""
        return _add_norm(x_D, self.mlp_output(value, y_D), gain_D, eps)

    def shares(self, level: float, shape: StepShape) -> dict[str, Work]:
        """What a level leaves of the parts of a dense step, by their names in `costs.StepCost`.

        Parts that are not named stay whole.  `index`, which dense steps lack, is in units of `cache`.
        """
        return {}


def kept_count(level: float, count: int) -> int:
    """How many of `count` a keep fraction keeps, at least 1: `key_selection.float32_ceil` on the host."""
    return int(np.clip(np.ceil(np.float32(level) * np.float32(count)), 1, count))


def effective(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes with those that are idle replaced by ones that do nothing, at no cost in time either."""
    return tuple(Axis(axis.levels, axis.budget, axis.penalty) if axis.idle else axis for axis in axes)


def held_full(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes with the full level alone: what dense decoding needs of them."""
    return tuple(dataclasses.replace(axis, levels=(axis.full,), level_costs=()) for axis in axes)


def mlp_input(
    axes: Sequence[Axis], action_X: jax.Array, x_D: jax.Array, gain_D: jax.Array, eps: float
) -> jax.Array:
    """The MLP's input from the residual stream: RMSNorm, then every axis in turn."""
    found = acting(axes, action_X, "mlp_input")
    if not found:
        return rms_norm(x_D, gain_D, eps)
    (_, first, value), *others = found
    y_D = first.norm_mlp_input(value, x_D, gain_D, eps)
    for _, axis, value in others:
        y_D = axis.mlp_input(value, y_D)
    return y_D


def mlp_output(
    axes: Sequence[Axis], action_X: jax.Array, y_D: jax.Array, x_D: jax.Array, gain_D: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """The residual stream x_D with the MLP's output after every axis in turn, and the RMSNorm of that."""
    found = acting(axes, action_X, "mlp_output")
    if not found:
        return _add_norm(x_D, y_D, gain_D, eps)
    *others, (_, last, value) = found
    for _, axis, own in others:
        y_D = axis.mlp_output(own, y_D)
    return last.mlp_output_norm(value, y_D, x_D, gain_D, eps)


def acting(axes: Sequence[Axis], action_X: jax.Array, effect: Effect) -> list[tuple[int, Axis, jax.Array]]:
    """The axes that act on a part of a step: place, axis and level of each.

    The others are left out rather than asked: an effect that does nothing would part two that are fused.
    """
    pairs = enumerate(zip(axes, action_X, strict=True))
    return [(x, axis, value) for x, (axis, value) in pairs if effect in axis.effects]


def _add_norm(x_D: jax.Array, y_D: jax.Array, gain_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    stream_D = x_D + y_D
    return stream_D, rms_norm(stream_D, gain_D, eps)


def check_budgets(axis: Axis, budgets: tuple[float, ...], source: str) -> None:
    """Raises `UserError` unless every budget lies between the costs of the axis' ends."""
    low, high = axis.cost(axis.levels[0]), axis.cost(axis.levels[-1])
    for budget in budgets:
        if not low - 1e-6 <= budget <= high + 1e-6:
            raise UserError(
                f"{source}: {axis.name} = {budget} cannot be met; the axis' levels cost {low:g} to {high:g}"
            )


@dataclasses.dataclass(frozen=True)
class ActionSpace:
    """The joint actions: every combination of the axes' levels, the last axis varying fastest."""

    axes: tuple[Axis, ...]

    @functools.cached_property
    def values_AxX(self) -> np.ndarray:
        """Level of each axis in each action, float32."""
        return np.array(list(itertools.product(*(axis.levels for axis in self.axes))), np.float32)

    @functools.cached_property
    def costs_AxX(self) -> np.ndarray:
        """Cost of each axis in each action, float32."""
        costs = ([axis.cost(level) for level in axis.levels] for axis in self.axes)
        return np.array(list(itertools.product(*costs)), np.float32)

    @property
    def num_actions(self) -> int:
        return len(self.values_AxX)

    @property
    def level_counts(self) -> tuple[int, ...]:
        """Number of levels of each axis."""
        return tuple(len(axis.levels) for axis in self.axes)

    @property
    def dense(self) -> int:
        """The action with every axis at its top level: what steps that may not be controlled take."""
        return self.num_actions - 1

    def join(self, level_X: jax.Array | np.ndarray) -> jax.Array:
        """Action of the given level index per axis ([..., X] -> [...])."""
        sizes = [len(axis.levels) for axis in self.axes]
        strides = np.cumprod([1, *sizes[:0:-1]])[::-1]
        return jnp.sum(jnp.asarray(level_X) * jnp.asarray(strides.copy()), -1)


class AxisContext(NamedTuple):
    """What an axis must know of a run besides its own config."""

    kernels: str = "auto"
    sinks: int = 4
    window: int = 2


@dataclasses.dataclass(frozen=True)
class AxisConfig(Options, abc.ABC):
    """What a config file says of an axis; `build` makes the axis of it."""

    levels: tuple[float, ...] = option((1.0,), "ascending; the last is the dearest")
    budget: tuple[float, float] = option((1.0, 1.0), "range of the mean costs that training asks for")
    budget_choices: tuple[float, ...] = option((), "mean costs to draw from instead of the range")
    penalty: float = option(100.0, "alpha: weight of a missed budget", at_least=0)

    @abc.abstractmethod
    def axis(self, context: AxisContext) -> Axis:
        """The axis at these levels and budgets."""

    def common(self, context: AxisContext) -> dict[str, Any]:
        """The arguments that every axis takes."""
        levels = tuple(float(level) for level in self.levels)
        return {
            "levels": levels,
            "budget": self.budget,
            "penalty": self.penalty,
            "budget_choices": self.budget_choices,
            "kernels": context.kernels,
        }

    def build(self, context: AxisContext) -> Axis:
        """The axis; one with a single level is asked for that level's cost, whatever its budget says."""
        axis = self.axis(context)
        if len(axis.levels) > 1:
            return axis
        return dataclasses.replace(axis, budget=(axis.cost(axis.levels[0]),) * 2, budget_choices=())

    def check(self) -> None:
        if not self.levels:
            raise self.wrong("levels", "a list of at least one level")
        if any(low >= high for low, high in itertools.pairwise(self.levels)):
            raise self.wrong("levels", "strictly ascending")
        self.check_levels()
        axis = self.build(AxisContext())
        check_budgets(axis, axis.budget, f"{self.where}budget")
        check_budgets(axis, axis.budget_choices, f"{self.where}budget_choices")
        if axis.budget[0] > axis.budget[1]:
            raise self.wrong("budget", "a range (low, high)")

    def check_levels(self) -> None:
        """Raises `UserError` for levels that this axis cannot take: unless overridden, outside (0, 1]."""
        if not all(0 < level <= 1 for level in self.levels):
            raise self.wrong("levels", "fractions in (0, 1]")
