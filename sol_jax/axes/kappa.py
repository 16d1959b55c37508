"""kappa, token attention sparsity: which keys of the KV cache a decode step reads, by three rules.

`Quest` is the paper's; `Recency` and `Relevancy` are the authors' alternatives.

Source: docs/method.md, "The three axes"; arXiv 2605.10875 section 3.  `H` counts key/value heads here and `G`
the query heads of each.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.cache import cut, put
from pallas_kernels.dispatch import without_triton
from pallas_kernels.quest import Select, extend_bounds, page_bounds, select_pages
from pallas_kernels.topk import at_least_kth
from sol_jax.axes.base import Axis, AxisConfig, AxisContext, Effect, StepShape, Work, kept_count
from sol_jax.axes.key_selection import KeysInReach, Selection, ends, exact_ceil, float32_ceil
from sol_jax.options import option


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
    `protect` keeps the sinks and the recent window whatever their score.  `heads="group"` is not Quest: the
    query heads of a key/value head take the same pages, so that a kernel reads each only once.

    The defaults are the rule of SOL's authors, which leaves out three of the original's (arXiv 2406.10774):
    `read_newest` always reads the page of the current token, and counts it in the budget; `dense_layers`
    layers, the first, read everything; and `least_pages` are read at least.
    """

    page_size: int = 8
    heads: Select = "head"
    protect: bool = False
    read_newest: bool = False
    dense_layers: int = 0
    least_pages: int = 1
    sinks: int = 4
    window: int = 2
    name: str = dataclasses.field(default="kappa", init=False)
    effects: ClassVar[frozenset[Effect]] = frozenset({"keys"})
    rule: ClassVar[str] = "quest"
    kept: ClassVar[str] = "the earlier text"

    def index_prefix(self, k_HxSxd: jax.Array) -> jax.Array:
        """Bounds of the prefix' pages, [H, P, 2d]."""
        every_S = jnp.ones(k_HxSxd.shape[1], bool)
        return page_bounds(k_HxSxd, every_S, self.page_size, without_triton(self.kernels))

    def update_prefix(self, index: jax.Array, k_HxSxd: jax.Array, start: jax.Array, count: int) -> jax.Array:
        """Bounds only the pages that hold such keys anew."""
        size, (S, P) = self.page_size, (k_HxSxd.shape[1], index.shape[1])
        pages = min((count + size - 2) // size + 1, P)  # if the first key is the last of its page
        if P * size != S:
            return self.index_prefix(k_HxSxd)
        first = jnp.minimum(start // size, P - pages)
        changed_HxPx2d = self.index_prefix(cut(k_HxSxd, first * size, pages * size, self.kernels))
        return put(index, changed_HxPx2d, first, self.kernels)

    def index_suffix(self, prefix_index: jax.Array, keys: KeysInReach) -> jax.Array:
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

    def index_token(self, suffix_index: jax.Array, k_Hxd: jax.Array, keys: KeysInReach) -> jax.Array:
        here_P = jnp.arange(suffix_index.shape[1]) == self._slot(keys, keys.step)
        return extend_bounds(suffix_index, k_Hxd, here_P)

    def _boundary(self, keys: KeysInReach) -> jax.Array:
        """Position at which the trailing pages start."""
        return keys.prefix_len // self.page_size * self.page_size

    def _slot(self, keys: KeysInReach, step: jax.Array) -> jax.Array:
        """Trailing page of the suffix entry `step`."""
        return (keys.prefix_len % self.page_size + step) // self.page_size

    def keep_pages(
        self,
        value: jax.Array,
        q_HxGxd: jax.Array,
        keys: KeysInReach,
        prefix_index: jax.Array,
        suffix_index: jax.Array,
        layer: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """Masks of the attended pages: whole prefix pages [H, G, P] and trailing pages."""
        whole_P = jnp.arange(prefix_index.shape[-2]) < keys.prefix_len // self.page_size
        begun_P = jnp.arange(suffix_index.shape[1]) <= self._slot(keys, keys.step)
        tokens = jnp.clip(float32_ceil(value, keys.kv_len), 1, keys.kv_len)
        pages = (tokens + self.page_size - 1) // self.page_size
        if self.least_pages > 1:
            pages = jnp.maximum(pages, self.least_pages)
        newest_P = jnp.arange(suffix_index.shape[1]) == self._slot(keys, keys.step)
        others_P = begun_P & ~newest_P if self.read_newest else begun_P
        ranked = (
            pages - 1 if self.read_newest else pages
        )  # the newest page has its place without being ranked
        whole_HxGxP, trailing_HxGxP = select_pages(
            q_HxGxd,
            (prefix_index, suffix_index),
            (whole_P, others_P),
            jnp.maximum(ranked, 1),
            layer=layer,
            select=self.heads,
            implementation=without_triton(self.kernels),
        )
        if self.read_newest:
            whole_HxGxP &= ranked > 0
            trailing_HxGxP = (trailing_HxGxP & (ranked > 0)) | newest_P
        if self.dense_layers and layer is not None:
            whole_HxGxP |= layer < self.dense_layers
            trailing_HxGxP |= layer < self.dense_layers
        return whole_HxGxP, trailing_HxGxP

    def select(
        self,
        value: jax.Array,
        q_HxGxd: jax.Array,
        keys: KeysInReach,
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
        keep, always = keep.by_token(S), ends(keys, self.sinks, self.window + 1)
        return Selection(keep.prefix | always.prefix, keep.suffix | always.suffix)

    def shares(self, level: float, shape: StepShape) -> dict[str, Work]:
        tokens = kept_count(level, shape.kv_len)
        if tokens == shape.kv_len:
            return {}
        entries = max(-(-tokens // self.page_size), self.least_pages) * self.page_size
        protected = self.sinks + self.window + 1 if self.protect else 0
        # The two bounds of a page are as long as a key and a value, and scoring it takes as many operations.
        index = -(-shape.kv_len // self.page_size) / shape.kv_len
        readers = shape if self.heads == "head" else shape._replace(group_size=1)
        read = _cache_shares(entries + protected, readers)
        dense = min(self.dense_layers / shape.num_layers, 1.0)  # layers that read all and rank nothing
        cache = Work(*(dense + (1 - dense) * share for share in read))
        return {"cache": cache, "index": Work((1 - dense) * index, (1 - dense) * index)}


@dataclasses.dataclass(frozen=True)
class Recency(Axis):
    """kappa by recency: `sinks` first tokens, the last `window + 1`, and the most recent of the rest."""

    sinks: int = 4
    window: int = 2
    name: str = dataclasses.field(default="kappa", init=False)
    effects: ClassVar[frozenset[Effect]] = frozenset({"keys"})
    rule: ClassVar[str] = "recency"
    kept: ClassVar[str] = "the earlier text"

    def select(
        self,
        value: jax.Array,
        q_HxGxd: jax.Array,
        keys: KeysInReach,
        prefix_index: Any,
        suffix_index: Any,
        layer: jax.Array | None = None,
    ) -> Selection:
        fixed = self.sinks + self.window + 1
        rest = jnp.maximum(keys.kv_len - fixed, 0)
        # Up to `fixed` keys the two ends meet or overlap, and all are kept.
        recent = jnp.where(rest == 0, keys.kv_len, self.window + 1 + exact_ceil(value, rest))
        return ends(keys, self.sinks, recent)

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
    effects: ClassVar[frozenset[Effect]] = frozenset({"keys"})
    rule: ClassVar[str] = "relevancy"
    kept: ClassVar[str] = "the earlier text"

    def select(
        self,
        value: jax.Array,
        q_HxGxd: jax.Array,
        keys: KeysInReach,
        prefix_index: Any,
        suffix_index: Any,
        layer: jax.Array | None = None,
    ) -> Selection:
        always = ends(keys, self.sinks, self.window + 2)
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
        values = _cache_shares(always + kept_count(level, rest) if rest else shape.kv_len, shape)
        # It ranks by the logits themselves: every key is read, and only values are saved.
        return {"cache": Work((1 + values.bytes) / 2, (1 + values.flops) / 2)}


@dataclasses.dataclass(frozen=True)
class KappaConfig(AxisConfig):
    """Which share of the KV cache attention reads, and by which rule it is chosen."""

    where = "config.axes.kappa."
    levels: tuple[float, ...] = option((0.1, 1.0), "shares of the cache, ascending")
    budget: tuple[float, float] = option((0.1, 1.0), "range of the mean costs that training asks for")
    rule: Literal["quest", "recency", "relevancy"] = option(
        "quest",
        "Quest's pages (the paper's); the most recent keys; or, an oracle, those of the largest logits",
    )
    page_size: int = option(
        8, "of quest: keys of a page (the paper's 2L, 3L and single axes have 4)", at_least=1
    )
    heads: Select = option(
        "head", "of quest: each query head has its own pages; group, another method, lets a group share them"
    )
    protect: bool = option(False, "of quest, not the paper's: always keep the sinks and the window")
    read_newest: bool = option(
        False,
        "of quest, the original's rule, not the paper's: always read the current token's page, and count it",
    )
    dense_layers: int = option(
        0, "of quest, likewise: so many layers, the first, read everything", at_least=0
    )
    least_pages: int = option(1, "of quest, likewise: so many pages are read at least", at_least=1)

    def axis(self, context: AxisContext) -> Axis:
        common = self.common(context) | {"sinks": context.sinks, "window": context.window}
        if self.rule == "recency":
            return Recency(**common)
        if self.rule == "relevancy":
            return Relevancy(**common)
        return Quest(
            **common,
            page_size=self.page_size,
            heads=self.heads,
            protect=self.protect,
            read_newest=self.read_newest,
            dense_layers=self.dense_layers,
            least_pages=self.least_pages,
        )

    def check_levels(self) -> None:
        super().check_levels()
        # The exact arithmetic of recency (`key_selection.exact_ceil`) does not reach below.
        if self.rule == "recency" and self.levels[0] < 2**-6:
            raise self.wrong("levels", "at least 1/64 under the recency rule")
