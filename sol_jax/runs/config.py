"""From a run's `ConfigDict` to the frozen dataclasses that the code below the entry points takes.

`check` refuses impossible values before anything heavy starts; every message names the field.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import default
from pallas_kernels import cost_model
from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.errors import UnavailableError
from sol_jax.axes.base import ActionSpace, Axis, check_budgets
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest, Recency, Relevancy
from sol_jax.axes.rho import ChannelPruning
from sol_jax.costs.decode_step import in_unit
from sol_jax.errors import UserError
from sol_jax.models.llama import LlamaConfig
from sol_jax.rl.policy import PolicyConfig
from sol_jax.rl.rollout import EpisodeConfig
from sol_jax.rl.train_step import GrpoConfig, Memory, OptimConfig, Setup

RULES = ("quest", "recency", "relevancy")
CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "kernels": ("auto", *IMPLEMENTATIONS),
    "axes.budget_unit": ("nominal", "bytes", "time"),
    "axes.kappa.rule": RULES,
    "axes.kappa.heads": ("head", "group"),
    "grpo.reward": ("likelihood", "acceptance"),
    "grpo.penalty_gradient": ("sampled", "expected"),
    "grpo.returns": ("sum", "max", "none"),
    "grpo.level": ("process", "outcome"),
    "grpo.norm": ("center", "zscore"),
}
# Smallest value of each number; an open bound is a strict one.
AT_LEAST = {
    "seed": 0,
    "episode.prefix_len": 1, "episode.horizon": 1, "episode.episodes_per_prefix": 1,
    "episode.sinks": 0, "episode.window": 0, "episode.jitter": 0, "axes.kappa.page_size": 1,
    "axes.kappa.penalty": 0, "axes.rho.penalty": 0, "axes.eta.penalty": 0,
    "policy.d_model": 1, "policy.num_heads": 1, "policy.num_layers": 1,
    "grpo.batch_size": 1, "grpo.num_schedules": 2, "grpo.entropy_coef": 0, "grpo.dead_zone": 0,
    "grpo.quality_weight": 0,
    "grpo.reference_kl_coef": 0, "optim.weight_decay": 0, "optim.warmup": 0, "optim.decay_steps": 0,
    "optim.minibatch_steps": 1, "optim.accumulate": 1, "train.num_updates": 0, "train.log_every": 1,
    "train.checkpoint_every": 1, "train.keep": 1, "eval.every": 0, "eval.num_blocks": 1,
    "eval.num_test_blocks": 0, "eval.batch_size": 1, "eval.num_random": 0,
    "memory.prefill_batch": 1, "memory.head_rows": 1,
}  # fmt: skip
ABOVE = {
    "policy.mlp_ratio": 0, "grpo.temperature": 0, "grpo.clip": 0, "grpo.max_price": 0,
    "optim.learning_rate": 0, "optim.clip_norm": 0,
}  # fmt: skip
SHARES = ("grpo.gamma", "grpo.divergence_weight", "data.validation_fraction", "data.test_fraction")


def field(config: ConfigDict, path: str) -> Any:
    """The value at a dotted path."""
    for name in path.split("."):
        config = config[name]
    return config


def check(config: ConfigDict) -> None:
    """Raises `UserError` naming the first field with an impossible value."""
    for path, allowed in CHOICES.items():
        if field(config, path) not in allowed:
            raise _wrong(config, path, f"one of {', '.join(allowed)}")
    for path, low in AT_LEAST.items():
        if not low <= field(config, path) < math.inf:
            raise _wrong(config, path, f"at least {low}")
    for path, low in ABOVE.items():
        if not low < field(config, path) < math.inf:
            raise _wrong(config, path, f"above {low}")
    for path in SHARES:
        if not 0 <= field(config, path) <= 1:
            raise _wrong(config, path, "between 0 and 1")
    if config.policy.d_model % config.policy.num_heads:
        raise _wrong(config, "policy.d_model", f"a multiple of policy.num_heads = {config.policy.num_heads}")
    if 0 < config.optim.decay_steps <= config.optim.warmup:
        raise _wrong(config, "optim.decay_steps", f"0, or above optim.warmup = {config.optim.warmup}")
    if config.grpo.penalty_gradient == "expected" and config.grpo.norm != "center":
        raise _wrong(config, "grpo.norm", "center where grpo.penalty_gradient is expected")
    if config.axes.budget_unit == "time":
        _prices(config)
    _check_axes(config)
    if config.kernels not in ("auto", "xla"):  # which need no device to be looked for yet
        try:
            choose("attend", config.kernels)
        except UnavailableError as error:
            raise UserError(f"config.kernels: {error}") from None


def _wrong(config: ConfigDict, path: str, right: str) -> UserError:
    return UserError(f"config.{path} is {field(config, path)!r}; it must be {right}")


def _check_axes(config: ConfigDict) -> None:
    for name in ("kappa", "rho", "eta"):
        for part in ("levels", "budget", "budget_choices"):
            if not _is_numbers(config.axes[name][part]):
                raise _wrong(config, f"axes.{name}.{part}", "a list of numbers")
        levels = tuple(config.axes[name].levels)
        if not levels:
            raise _wrong(config, f"axes.{name}.levels", "a list of at least one level")
        if any(low >= high for low, high in itertools.pairwise(levels)):
            raise _wrong(config, f"axes.{name}.levels", "strictly ascending")
        if name == "eta" and not all(2 <= bits <= 16 and int(bits) == bits for bits in levels):
            raise _wrong(config, "axes.eta.levels", "whole numbers of bits from 2 to 16")
        if name != "eta" and not all(0 < level <= 1 for level in levels):
            raise _wrong(config, f"axes.{name}.levels", "fractions in (0, 1]")
        # Below 2**-6 the exact recency arithmetic (keys.exact_ceil) does not reach.
        if name == "kappa" and config.axes.kappa.rule == "recency" and levels[0] < 2**-6:
            raise _wrong(config, "axes.kappa.levels", "at least 1/64 under the recency rule")
    for axis in build_axes(config):
        check_budgets(axis, axis.budget, f"config.axes.{axis.name}.budget")
        check_budgets(axis, axis.budget_choices, f"config.axes.{axis.name}.budget_choices")
        if len(axis.budget) != 2 or axis.budget[0] > axis.budget[1]:
            raise _wrong(config, f"axes.{axis.name}.budget", "a range (low, high)")
    axes = build_axes(config)
    if not config.eval.budgets:
        raise _wrong(config, "eval.budgets", "a list of at least one budget")
    for budget in config.eval.budgets:
        if not _is_numbers(budget) or len(budget) != len(axes):
            raise _wrong(config, "eval.budgets", f"tuples of {len(axes)} costs, one per axis")
        for axis, cost in zip(axes, budget, strict=True):
            if len(axis.levels) > 1:  # a single-level axis is at its level, whatever is asked
                check_budgets(axis, (cost,), "config.eval.budgets")


def _is_numbers(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(x, int | float) for x in value)


def build_axes(config: ConfigDict) -> tuple[Axis, ...]:
    """The three axes; one with a single level asks for that level's cost, whatever its budget says."""
    kappa, rho, eta = config.axes.kappa, config.axes.rho, config.axes.eta
    ends = {"sinks": config.episode.sinks, "window": config.episode.window}
    pages = {"page_size": kappa.page_size, "heads": kappa.heads, "protect": kappa.protect}
    rules = {
        "quest": lambda common: Quest(**common, **ends, **pages),
        "recency": lambda common: Recency(**common, **ends),
        "relevancy": lambda common: Relevancy(**common, **ends),
    }
    common = functools.partial(_common, kernels=config.kernels)
    axes = (
        rules[kappa.rule](common(kappa)),
        ChannelPruning(**common(rho)),
        OutputQuantization(**common(eta)),
    )
    return tuple(
        dataclasses.replace(a, budget=(a.cost(a.levels[0]),) * 2, budget_choices=())
        if len(a.levels) == 1
        else a
        for a in axes
    )


def _common(axis: ConfigDict, kernels: str) -> dict[str, Any]:
    return {
        "kernels": kernels,
        "levels": tuple(float(level) for level in axis.levels),
        "budget": tuple(axis.budget),
        "penalty": axis.penalty,
        "budget_choices": tuple(axis.budget_choices),
    }


def build_episode(config: ConfigDict) -> EpisodeConfig:
    """The shape of an episode."""
    e = config.episode
    return EpisodeConfig(e.prefix_len, e.horizon, e.episodes_per_prefix, e.sinks + e.window + 1, e.jitter)


def build(config: ConfigDict, model: LlamaConfig) -> Setup:
    """Everything static about a run; raises `UserError` if the model is too small for its episodes."""
    episode = build_episode(config)
    if episode.block_length - 1 > model.max_position:
        raise UserError(
            f"config.episode: prefix_len + episodes_per_prefix * horizon = {episode.block_length - 1} tokens "
            f"exceed the model's context of {model.max_position}"
        )
    if episode.jitter >= episode.prefix_len:
        raise UserError(
            f"config.episode.jitter = {episode.jitter} must be less than prefix_len, {episode.prefix_len}"
        )
    space = ActionSpace(tuple(_in_unit(axis, config, model) for axis in build_axes(config)))
    sizes = config.policy.to_dict()
    factored, page_input = sizes.pop("factored_head"), sizes.pop("page_input")
    policy = PolicyConfig(
        model.hidden_size,
        space.num_actions,
        episode.horizon,
        len(space.axes),
        **sizes,
        factors=tuple(len(axis.levels) for axis in space.axes) if factored else (),
        page_size=config.axes.kappa.page_size if page_input else 0,
    )
    grpo = {name: value for name, value in config.grpo.items() if name != "batch_size"}
    return Setup(
        dataclasses.replace(model, kernels=config.kernels),
        space,
        episode,
        policy,
        GrpoConfig(**grpo),
        OptimConfig(**config.optim.to_dict()),
        Memory(**config.memory.to_dict()),
    )


def _in_unit(axis: Axis, config: ConfigDict, model: LlamaConfig) -> Axis:
    """The axis with the costs of `config.axes.budget_unit`, at the middle of an episode."""
    unit = config.axes.budget_unit
    prices = _prices(config) if unit == "time" else None
    return in_unit(axis, unit, model, config.episode.prefix_len + config.episode.horizon // 2, prices)


def _prices(config: ConfigDict) -> cost_model.CostModel:
    if not config.axes.prices:
        raise _wrong(config, "axes.prices", "a cost model (a JSON file), for budget_unit is 'time'")
    try:
        return cost_model.load(pathlib.Path(config.axes.prices))
    except ValueError as error:
        raise UserError(f"config.axes.prices: {error}") from None


def requested(config: ConfigDict, space: ActionSpace) -> tuple[tuple[float, ...], ...]:
    """The keep rates of `config.eval.budgets` as mean costs, in the unit of the axes.

    Of an axis with a single level it is that level's cost, as in training.
    """

    def cost(axis: Axis, rate: float) -> float:
        return float(axis.budget_for(rate) if len(axis.levels) > 1 else axis.cost(axis.levels[0]))

    return tuple(
        tuple(cost(axis, rate) for axis, rate in zip(space.axes, rates, strict=True))
        for rates in config.eval.budgets
    )


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value, lists and tuples alike as lists (what JSON gives back)."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _listed(value)
    return flat


def unflatten(flat: Mapping[str, Any]) -> ConfigDict:
    """The config that `flatten` gave these values of."""
    config = ConfigDict()
    for name, value in flat.items():
        node = config
        *parents, leaf = name.split(".")
        for parent in parents:
            if parent not in node:
                node[parent] = ConfigDict()
            node = node[parent]
        node[leaf] = value
    return config


def restored(flat: Mapping[str, Any]) -> ConfigDict:
    """The config of an earlier run or policy from its `flatten`ed form.

    A field that came after it has its default: what the code did before.
    """
    return unflatten(flatten(default.get_config()) | dict(flat))


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, list | tuple) else value
