"""The efficiency axes: each a small object that says what an action costs and what it does to a step.

An axis has levels, a cost per level (the unit budgets are stated in), a penalty weight, and effects on
one decode step of one schedule.  Effects default to "none", so a new axis overrides only what it
changes; neither the trainer nor the rollout names an axis.

Source: sol.md section 2; arXiv 2605.10875 section 3.  `H` counts key/value heads here and `G` the query
heads of each.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.dispatch import without_triton
from pallas_kernels.prune import keep_channels
from pallas_kernels.quantize import MAX_BITS, fake_quantize
from pallas_kernels.quest import extend_bounds, page_bounds, select_pages
from pallas_kernels.topk import at_least_kth


class Keys(NamedTuple):
    """The keys a decode step may attend to: the shared prefix, then the schedule's own, the current last.

    `prefix_HxSxd` may be longer than `prefix_len`; `suffix_HxTxd` is filled up to and including `step`.
    """

    prefix_HxSxd: jax.Array
    suffix_HxTxd: jax.Array
    prefix_len: jax.Array
    step: jax.Array

    @property
    def kv_len(self) -> jax.Array:
        """Keys in reach, the current token's own included."""
        return self.prefix_len + self.step + 1

    @property
    def positions(self) -> tuple[jax.Array, jax.Array]:
        """Position in the text of each prefix and suffix entry: [S], [T]."""
        S, T = self.prefix_HxSxd.shape[1], self.suffix_HxTxd.shape[1]
        return jnp.arange(S), self.prefix_len + jnp.arange(T)

    @property
    def valid(self) -> "Selection":
        """Every key in reach: masks [1, 1, S] and [1, 1, T]."""
        S, T = self.prefix_HxSxd.shape[1], self.suffix_HxTxd.shape[1]
        prefix_S, suffix_T = jnp.arange(S) < self.prefix_len, jnp.arange(T) <= self.step
        return Selection(prefix_S[None, None], suffix_T[None, None])


class Selection(NamedTuple):
    """Which keys a step attends to: masks that broadcast to [H, G, P] and [H, G, T].

    The prefix' is by page of `page_size` consecutive positions, the suffix' by position.
    """

    prefix: jax.Array
    suffix: jax.Array
    page_size: int = 1

    def by_token(self, prefix_len: int) -> "Selection":
        """The same with pages of one position, for a prefix (its room, not its filled part) so long."""
        return Selection(jnp.repeat(self.prefix, self.page_size, -1)[..., :prefix_len], self.suffix)

    def both(self, other: "Selection", prefix_len: int) -> "Selection":
        """The keys that are in both."""
        a, b = self, other
        if a.page_size != b.page_size:
            a, b = a.by_token(prefix_len), b.by_token(prefix_len)
        return Selection(a.prefix & b.prefix, a.suffix & b.suffix, a.page_size)


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


def float32_ceil(fraction: jax.Array, count: jax.Array) -> jax.Array:
    """`ceil(f32(fraction) * f32(count))` as int32: the budget arithmetic of sol.md section 2."""
    return jnp.ceil(jnp.float32(fraction) * jnp.asarray(count).astype(jnp.float32)).astype(jnp.int32)


def exact_ceil(fraction: jax.Array, count: jax.Array) -> jax.Array:
    """`ceil(f32(fraction) * count)` without rounding the product, for fraction in [2**-6, 1], count < 2**17.

    The authors' recency mask multiplies in Python, in double precision, so 0.1 * 10 is a little above 1
    there.  No float64 on accelerators: the product is taken in integers, in units of 2**-29.
    """
    # Exact: a power of two scales without rounding.
    unit = (jnp.float32(fraction) * 2.0**29).astype(jnp.uint32)
    high, low = unit >> 15, unit & 0x7FFF
    count = jnp.asarray(count).astype(jnp.uint32)
    low_product = low * count
    quotient = high * count + (low_product >> 15)
    remainder = (quotient & 0x3FFF) | (low_product & 0x7FFF)
    return ((quotient >> 14) + (remainder > 0)).astype(jnp.int32)


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

    @property
    def penalty_weight(self) -> float:
        """alpha of the paper; an axis without a choice cannot miss its budget (sol.md section 5)."""
        return self.penalty if self.cost(self.levels[0]) != self.cost(self.levels[-1]) else 0.0

    def cost(self, level: float) -> float:
        """Cost of a level, in the unit in which budgets are stated."""
        return self.level_costs[self.levels.index(level)] if self.level_costs else self.nominal_cost(level)

    def nominal_cost(self, level: float) -> float:
        """The paper's cost of a level, as a share of the full one (sol.md section 1)."""
        return level

    def budget_for(self, keep_rate: float) -> float:
        """The mean cost of mixing the two levels around a nominal mean cost to meet it."""
        if not self.level_costs:
            return keep_rate
        nominal = [self.nominal_cost(level) for level in self.levels]
        return float(np.interp(keep_rate, nominal, self.level_costs))

    def index_prefix(self, k_HxSxd: jax.Array) -> Any:
        """What to remember of a prefix' keys (one layer), computed once for all schedules."""
        return ()

    def index_suffix(self, prefix_index: Any, keys: Keys) -> Any:
        """The same for a schedule's own keys, before its first step (`keys.suffix_HxTxd` unused)."""
        return ()

    def index_token(self, suffix_index: Any, k_Hxd: jax.Array, keys: Keys) -> Any:
        """`suffix_index` once the current token's key is there."""
        return suffix_index

    def select(
        self,
        value: jax.Array,
        q_HxGxd: jax.Array,
        keys: Keys,
        prefix_index: Any,
        suffix_index: Any,
        layer: jax.Array | None = None,
    ) -> Selection | None:
        """The keys that attention reads; None means all.

        With `layer`, `prefix_index` is that of all layers, of which one is read in place: a slice of it would
        be copied before a kernel sees it.
        """
        return None

    def mlp_input(self, value: jax.Array, x_D: jax.Array) -> jax.Array:
        """Acts on the MLP's (normed) input."""
        return x_D

    def mlp_output(self, value: jax.Array, y_D: jax.Array) -> jax.Array:
        """Acts on the MLP's output, before the residual add."""
        return y_D

    def shares(self, level: float, shape: StepShape) -> dict[str, Work]:
        """What a level leaves of the parts of a dense step, by their names in `costs.StepCost`.

        Parts that are not named stay whole.  `index`, which dense steps lack, is in units of `cache`.
        """
        return {}


def _chosen(level: float, count: int) -> int:
    """`float32_ceil` on the host, in 1 .. count."""
    return int(np.clip(np.ceil(np.float32(level) * np.float32(count)), 1, count))


def _cache_shares(entries: int, shape: StepShape) -> Work:
    """Attention over `entries` keys per query head; at worst, each head of a group reads others."""
    entries = min(entries, shape.kv_len)
    read = min(entries * shape.group_size, shape.kv_len)
    return Work(read / shape.kv_len, entries / shape.kv_len)


@dataclasses.dataclass(frozen=True)
class Quest(Axis):
    """kappa by Quest: the pages of the KV cache whose best possible logit is highest, per query head.

    Pages are `page_size` consecutive positions from 0.  Whole pages of the prefix are bounded once;
    the page in which the prefix ends and those after it are the schedule's own (its *trailing* pages).
    `protect` keeps the sinks and the recent window whatever their score.
    """

    page_size: int = 8
    protect: bool = False
    sinks: int = 4
    window: int = 2
    name: str = dataclasses.field(default="kappa", init=False)

    def index_prefix(self, k_HxSxd: jax.Array) -> jax.Array:
        """Bounds of the prefix' pages, [H, P, 2d]."""
        every_S = jnp.ones(k_HxSxd.shape[1], bool)
        return page_bounds(k_HxSxd, every_S, self.page_size, without_triton(self.kernels))

    def index_suffix(self, prefix_index: jax.Array, keys: Keys) -> jax.Array:
        """Bounds of the trailing pages: the first begins with the prefix' last keys, the rest are empty."""
        (H, _, d), T = keys.prefix_HxSxd.shape, keys.suffix_HxTxd.shape[1]
        pages = (self.page_size + T - 2) // self.page_size + 1  # if the prefix ends one key short of a page
        # The prefix' last keys lie in this window, whose start the clamp moves back if it would stick out.
        N = min(self.page_size, keys.prefix_HxSxd.shape[1])
        start = jnp.minimum(self._boundary(keys), keys.prefix_HxSxd.shape[1] - N)
        last_HxNxd = lax.dynamic_slice_in_dim(keys.prefix_HxSxd, start, N, 1)
        position_N = start + jnp.arange(N)
        partial_N = (position_N >= self._boundary(keys)) & (position_N < keys.prefix_len)
        first_Hx1x2d = page_bounds(last_HxNxd, partial_N, N)
        empty_HxPx2d = page_bounds(
            jnp.zeros((H, pages - 1, d), first_Hx1x2d.dtype), jnp.zeros(pages - 1, bool), 1
        )
        return jnp.concatenate([first_Hx1x2d, empty_HxPx2d], 1)

    def index_token(self, suffix_index: jax.Array, k_Hxd: jax.Array, keys: Keys) -> jax.Array:
        here_P = jnp.arange(suffix_index.shape[1]) == self._slot(keys, keys.step)
        return extend_bounds(suffix_index, k_Hxd, here_P)

    def _boundary(self, keys: Keys) -> jax.Array:
        """Position at which the trailing pages start."""
        return keys.prefix_len // self.page_size * self.page_size

    def _slot(self, keys: Keys, step: jax.Array) -> jax.Array:
        """Trailing page of the suffix entry `step`."""
        return (keys.prefix_len % self.page_size + step) // self.page_size

    def keep_pages(
        self,
        value: jax.Array,
        q_HxGxd: jax.Array,
        keys: Keys,
        prefix_index: jax.Array,
        suffix_index: jax.Array,
        layer: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """Masks of the attended pages: whole prefix pages [H, G, P] and trailing pages."""
        whole_P = jnp.arange(prefix_index.shape[-2]) < keys.prefix_len // self.page_size
        begun_P = jnp.arange(suffix_index.shape[1]) <= self._slot(keys, keys.step)
        tokens = jnp.clip(float32_ceil(value, keys.kv_len), 1, keys.kv_len)
        pages = (tokens + self.page_size - 1) // self.page_size
        bounds, used = (prefix_index, suffix_index), (whole_P, begun_P)
        chosen = without_triton(self.kernels)
        return select_pages(q_HxGxd, bounds, used, pages, layer=layer, implementation=chosen)

    def select(
        self,
        value: jax.Array,
        q_HxGxd: jax.Array,
        keys: Keys,
        prefix_index: jax.Array,
        suffix_index: jax.Array,
        layer: jax.Array | None = None,
    ) -> Selection:
        whole_HxGxP, trailing_HxGxP = self.keep_pages(value, q_HxGxd, keys, prefix_index, suffix_index, layer)
        S, T = keys.prefix_HxSxd.shape[1], keys.suffix_HxTxd.shape[1]
        whole_P = jnp.arange(whole_HxGxP.shape[-1]) < keys.prefix_len // self.page_size
        keep = Selection(
            prefix=jnp.where(whole_P, whole_HxGxP, trailing_HxGxP[..., :1]),
            suffix=jnp.take(trailing_HxGxP, self._slot(keys, jnp.arange(T)), -1, mode="clip"),
            page_size=self.page_size,
        )
        if not self.protect:
            return keep
        keep, always = keep.by_token(S), _always(keys, self.sinks, self.window + 1)
        return Selection(keep.prefix | always.prefix, keep.suffix | always.suffix)

    def shares(self, level: float, shape: StepShape) -> dict[str, Work]:
        tokens = _chosen(level, shape.kv_len)
        if tokens == shape.kv_len:
            return {}
        entries = -(-tokens // self.page_size) * self.page_size
        protected = self.sinks + self.window + 1 if self.protect else 0
        # The two bounds of a page are as long as a key and a value, and scoring it takes as many operations.
        index = -(-shape.kv_len // self.page_size) / shape.kv_len
        return {"cache": _cache_shares(entries + protected, shape), "index": Work(index, index)}


def _always(keys: Keys, sinks: int, recent: int | jax.Array) -> Selection:
    """The first `sinks` and the last `recent` keys in reach."""
    prefix_S, suffix_T = ((p < sinks) | (p >= keys.kv_len - recent) for p in keys.positions)
    return Selection(prefix_S[None, None], suffix_T[None, None])


@dataclasses.dataclass(frozen=True)
class Recency(Axis):
    """kappa by recency: `sinks` first tokens, the last `window + 1`, and the most recent of the rest."""

    sinks: int = 4
    window: int = 2
    name: str = dataclasses.field(default="kappa", init=False)

    def select(
        self,
        value: jax.Array,
        q_HxGxd: jax.Array,
        keys: Keys,
        prefix_index: Any,
        suffix_index: Any,
        layer: jax.Array | None = None,
    ) -> Selection:
        fixed = self.sinks + self.window + 1
        rest = jnp.maximum(keys.kv_len - fixed, 0)
        # Up to `fixed` keys the two ends meet or overlap, and all are kept.
        recent = jnp.where(rest == 0, keys.kv_len, self.window + 1 + exact_ceil(value, rest))
        return _always(keys, self.sinks, recent)

    def shares(self, level: float, shape: StepShape) -> dict[str, Work]:
        fixed = self.sinks + self.window + 1
        rest = max(shape.kv_len - fixed, 0)
        # Exact in Python's double precision, as `exact_ceil` is.
        share = (fixed + math.ceil(float(np.float32(level)) * rest)) / shape.kv_len if rest else 1.0
        return {"cache": Work(share, share)}  # the same keys for every head


@dataclasses.dataclass(frozen=True)
class Relevancy(Axis):
    """kappa by relevancy, an oracle: per head the keys with the highest attention logits.

    `sinks` first and `window + 2` last tokens are always kept (one more than by recency, as in the
    authors' code); keep fraction 0 still keeps the best of the rest.
    """

    sinks: int = 4
    window: int = 2
    name: str = dataclasses.field(default="kappa", init=False)

    def select(
        self,
        value: jax.Array,
        q_HxGxd: jax.Array,
        keys: Keys,
        prefix_index: Any,
        suffix_index: Any,
        layer: jax.Array | None = None,
    ) -> Selection:
        always = _always(keys, self.sinks, self.window + 2)
        rest = jnp.maximum(keys.kv_len - self.sinks - self.window - 2, 0)

        def logits(k_HxNxd: jax.Array, valid: jax.Array, kept: jax.Array) -> jax.Array:
            logit = jnp.einsum("hgd,hnd->hgn", q_HxGxd, k_HxNxd, preferred_element_type=jnp.float32)
            return jnp.where(valid & ~kept, logit, -jnp.inf)

        of_prefix = logits(keys.prefix_HxSxd, keys.valid.prefix, always.prefix)
        of_suffix = logits(keys.suffix_HxTxd, keys.valid.suffix, always.suffix)
        both = jnp.concatenate([of_prefix, of_suffix], -1)
        count = jnp.maximum(float32_ceil(value, rest), 1)
        best = at_least_kth(both, jnp.broadcast_to(count, both.shape[:-1]))
        S = keys.prefix_HxSxd.shape[1]
        return Selection(best[..., :S] | always.prefix, best[..., S:] | always.suffix)

    def shares(self, level: float, shape: StepShape) -> dict[str, Work]:
        always = self.sinks + self.window + 2
        rest = max(shape.kv_len - always, 0)
        values = _cache_shares(always + _chosen(level, rest) if rest else shape.kv_len, shape)
        # It ranks by the logits themselves: every key is read, and only values are saved.
        return {"cache": Work((1 + values.bytes) / 2, (1 + values.flops) / 2)}


@dataclasses.dataclass(frozen=True)
class ChannelPruning(Axis):
    """rho: the largest channels of the MLP's input survive."""

    name: str = dataclasses.field(default="rho", init=False)

    def nominal_cost(self, level: float) -> float:
        return level / max(self.levels)

    def mlp_input(self, value: jax.Array, x_D: jax.Array) -> jax.Array:
        return keep_channels(x_D, value, without_triton(self.kernels))

    def shares(self, level: float, shape: StepShape) -> dict[str, Work]:
        share = _chosen(level, shape.hidden_size) / shape.hidden_size
        return {"gate_up": Work(share, share)}


@dataclasses.dataclass(frozen=True)
class OutputQuantization(Axis):
    """q: the MLP's output is rounded to q bits; its cost is eta = q / 16."""

    name: str = dataclasses.field(default="eta", init=False)

    def nominal_cost(self, level: float) -> float:
        return level / MAX_BITS

    def mlp_output(self, value: jax.Array, y_D: jax.Array) -> jax.Array:
        return fake_quantize(y_D, value, without_triton(self.kernels))

    def shares(self, level: float, shape: StepShape) -> dict[str, Work]:
        return {"mlp_output": Work(level / shape.dtype_bits, 1.0)} if level < MAX_BITS else {}


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
    def dense(self) -> int:
        """The action with every axis at its top level: what steps that may not be controlled take."""
        return self.num_actions - 1

    def join(self, level_X: jax.Array | np.ndarray) -> jax.Array:
        """Action of the given level index per axis ([..., X] -> [...])."""
        sizes = [len(axis.levels) for axis in self.axes]
        strides = np.cumprod([1, *sizes[:0:-1]])[::-1]
        return jnp.sum(jnp.asarray(level_X) * jnp.asarray(strides.copy()), -1)
