"""The frozen Llama as pure functions: one sequence, one schedule; batch with `jax.vmap`.

Two ways through the same layers.  `prefill` runs a whole sequence densely and returns its KV cache;
`decode_step` runs one token against that cache (the *prefix*, shared by every schedule of the
sequence) and the schedule's own later entries (the *suffix*), letting the efficiency axes act.

Matrix products take operands of `cfg.dtype` and accumulate in float32; the residual stream, norms,
rotary embedding and softmax are float32 always.

Source: Llama 3 (arXiv 2407.21783); numerics follow `transformers`' `LlamaForCausalLM`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention import attend
from pallas_kernels.cache import as_bits, as_numbers, cut, put, row_major, take_layer, take_rows
from pallas_kernels.causal_attention import causal_attention
from pallas_kernels.dispatch import current_platform
from pallas_kernels.gated_mlp import gated_hidden
from pallas_kernels.linear import match, project
from pallas_kernels.norm import rms_norm
from sol_jax.axes.base import Axis, acting, effective, mlp_input, mlp_output
from sol_jax.axes.key_selection import KeysInReach

Weights = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary wavelengths (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Everything about the architecture that the maths depends on; sizes in elements."""

    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    rope_scaling: RopeScaling | None = None
    dtype: str = "float32"  # of weights, caches and matmul operands; sums are float32
    # Of decode steps: "auto" (by platform and shape), "xla", "pallas", "triton" (jax-triton where it has a
    # kernel, Pallas elsewhere) or "native" (C++ for CPUs).  A named one runs or raises `UnavailableError`.
    kernels: str = "auto"

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


class ParamSpec(NamedTuple):
    """One weight: its shape, a logical name for each dimension (for sharding) and its initial scale."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stddev: float  # 0 marks a norm's gain, which starts at 1


def weight_specs(cfg: LlamaConfig) -> Weights:
    """The abstract tree that shapes, init, loading and sharding all follow; layers are stacked on axis 0."""
    L, D, F, V = cfg.num_layers, cfg.hidden_size, cfg.ffn_size, cfg.vocab_size
    H, Hkv, d = cfg.num_heads, cfg.num_kv_heads, cfg.head_size
    into, ffn = D**-0.5, F**-0.5
    specs: Weights = {
        "embed": ParamSpec((V, D), ("vocab", "hidden"), into),
        "layers": {
            "attn_norm": ParamSpec((L, D), ("layer", None), 0.0),
            # Heads and their channels are one dimension, head by head: a TPU lays [heads, channels] out in
            # tiles of its own, and every program would copy all layers into those of a matrix.
            "q": ParamSpec((L, D, H * d), ("layer", "hidden", "heads"), into),
            "k": ParamSpec((L, D, Hkv * d), ("layer", "hidden", "kv_heads"), into),
            "v": ParamSpec((L, D, Hkv * d), ("layer", "hidden", "kv_heads"), into),
            "o": ParamSpec((L, H * d, D), ("layer", "heads", "hidden"), (H * d) ** -0.5),
            "mlp_norm": ParamSpec((L, D), ("layer", None), 0.0),
            "gate": ParamSpec((L, D, F), ("layer", "hidden", "ffn"), into),
            "up": ParamSpec((L, D, F), ("layer", "hidden", "ffn"), into),
            "down": ParamSpec((L, F, D), ("layer", "ffn", "hidden"), ffn),
        },
        "final_norm": ParamSpec((D,), (None,), 0.0),
    }
    if not cfg.tie_embeddings:
        specs["lm_head"] = ParamSpec((D, V), ("hidden", "vocab"), into)
    return specs


def _is_spec(node: Any) -> bool:
    return isinstance(node, ParamSpec)


def abstract_weights(cfg: LlamaConfig) -> Weights:
    """`weight_specs` as `jax.ShapeDtypeStruct`s: enough to lower a program without any weights."""

    def shaped(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(cfg.dtype))

    return jax.tree.map(shaped, weight_specs(cfg), is_leaf=_is_spec)


def init_weights(key: jax.Array, cfg: LlamaConfig) -> Weights:
    """Random weights (normal, fan-in scaled; gains 1), for tests and benchmarks."""
    specs, treedef = jax.tree.flatten(weight_specs(cfg), is_leaf=_is_spec)
    keys = jax.random.split(key, len(specs))

    def init(key: jax.Array, spec: ParamSpec) -> jax.Array:
        if spec.stddev == 0.0:
            return jnp.ones(spec.shape, cfg.dtype)
        return (spec.stddev * jax.random.normal(key, spec.shape)).astype(cfg.dtype)

    return jax.tree.unflatten(treedef, [init(k, s) for k, s in zip(keys, specs, strict=True)])


class KVCache(NamedTuple):
    """Keys (after RoPE) and values of one sequence or one schedule: [L, Hkv, N, d] each."""

    k: jax.Array
    v: jax.Array


class Prefix(NamedTuple):
    """What all schedules of an episode read and none writes.

    `cache` may hold more than `length` entries (prompts of several lengths in one batch, or episodes
    that share a prefill): the rest is masked.  `axis_index` is what each axis keeps about the keys, with a
    leading layer axis (Quest's page bounds).
    """

    cache: KVCache
    axis_index: tuple[Any, ...]
    length: jax.Array  # int32 scalar


class IndexedCache(NamedTuple):
    """A dense cache and what each axis keeps about its keys: what episodes of one prefill share."""

    cache: KVCache
    axis_index: tuple[Any, ...]

    def prefix(self, length: jax.Array) -> Prefix:
        """Its first `length` entries, as what the schedules of an episode decode against."""
        return Prefix(self.cache, self.axis_index, jnp.asarray(length, jnp.int32))


class Written(NamedTuple):
    """What one step writes, by layer, `as_bits`: its entry and each axis' summary of the suffix with it."""

    entry: KVCache  # [L, Hkv, d] each
    axis_index: tuple[Any, ...]


class Suffix(NamedTuple):
    """What one schedule wrote so far: cache entries and each axis' summary of them, by layer, `as_bits`."""

    cache: KVCache
    axis_index: tuple[Any, ...]

    def with_token(self, written: Written, step: jax.Array) -> "Suffix":
        """The suffix with what `step` wrote.

        All layers at once: were it written in the loop over layers, XLA's CPU compiler would copy it in each.
        """
        cache = (_put_token(old, new, step) for old, new in zip(self.cache, written.entry, strict=True))
        return Suffix(KVCache(*cache), written.axis_index)


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x [..., n] . w [n, m]`: operands of w's dtype, float32 result."""
    return jnp.tensordot(x.astype(w.dtype), w, 1, preferred_element_type=jnp.float32)


def rope_frequencies(cfg: LlamaConfig) -> np.ndarray:
    """Angular frequencies [d/2] in radians per position, stretched as `cfg.rope_scaling` says."""
    # Powers in float64: float32 ones are a rounding off torch's, 5e-4 radians at position 8,192.
    exponent = np.arange(0, cfg.head_size, 2, dtype=np.float32) / np.float32(cfg.head_size)
    base = np.float64(cfg.rope_theta) ** exponent.astype(np.float64)
    freq = np.float32(1.0) / base.astype(np.float32)
    if cfg.rope_scaling is None:
        return freq
    s = cfg.rope_scaling
    wavelength = 2 * np.pi / freq.astype(np.float64)
    # Share of the original frequency: 1 for short waves, 0 (fully stretched) for long ones.
    span = s.high_freq_factor - s.low_freq_factor
    keep = np.clip((s.original_max_position / wavelength - s.low_freq_factor) / span, 0.0, 1.0)
    return ((1 - keep) * freq / s.factor + keep * freq).astype(np.float32)


class Rope(NamedTuple):
    """Cosines and sines of the rotary angles at some positions: [..., d/2] each."""

    cos: jax.Array
    sin: jax.Array


def rope_at(position: jax.Array, cfg: LlamaConfig) -> Rope:
    """The rotation of every layer at `position`, computed once outside the loop over layers."""
    angle = position[..., None].astype(jnp.float32) * rope_frequencies(cfg)
    return Rope(jnp.cos(angle), jnp.sin(angle))


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotary embedding of x [..., heads, d] by angles [..., d/2]."""
    cos, sin = rope.cos[..., None, :], rope.sin[..., None, :]
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def embed(weights: Weights, token: jax.Array, kernels: str = "xla") -> jax.Array:
    """Input embeddings in float32; `kernels` as of decode steps."""
    return take_rows(weights["embed"], token, kernels).astype(jnp.float32)


def logits(weights: Weights, hidden: jax.Array, kernels: str = "xla") -> jax.Array:
    """Next-token logits [..., V] from final-norm hidden states [..., D]; `kernels` as of decode steps."""
    if "lm_head" not in weights:
        return match(hidden, weights["embed"], kernels)
    project_row = jnp.vectorize(
        lambda hidden_D: project(hidden_D, [weights["lm_head"]], kernels)[0], signature="(d)->(v)"
    )
    return dot(hidden, weights["lm_head"]) if kernels == "xla" else project_row(hidden)


def token_logit(weights: Weights, hidden_D: jax.Array, token: jax.Array, kernels: str = "xla") -> jax.Array:
    """The logit of one token alone, float32: a row of the head instead of all of them."""
    if "lm_head" not in weights:
        return jnp.dot(embed(weights, token, kernels), hidden_D.astype(jnp.float32))
    column_D = cut(weights["lm_head"][..., None], token, 1, kernels)[:, 0, 0]
    return jnp.dot(column_D.astype(jnp.float32), hidden_D.astype(jnp.float32))


def _rotated(qkv: tuple[jax.Array, ...], rope: Rope, cfg: LlamaConfig) -> tuple[jax.Array, ...]:
    """Queries and keys rotated, and values, in `cfg.dtype`: [..., heads * d] to [..., heads, d]."""
    q, k, v = (x.reshape(*x.shape[:-1], -1, cfg.head_size) for x in map(row_major, qkv))
    return rotate(q, rope).astype(cfg.dtype), rotate(k, rope).astype(cfg.dtype), v.astype(cfg.dtype)


def _dense_layer(
    layers: Weights,
    i: jax.Array,
    x_NxD: jax.Array,
    rope: Rope,
    cfg: LlamaConfig,
    attend: Callable[..., jax.Array],
    kernels: str,
) -> tuple[jax.Array, KVCache]:
    """Layer `i` over N tokens at once; `attend` takes their q [N, H, d], k and v [Hkv, N, d]."""

    def products(x_NxD: jax.Array, *names: str) -> tuple[jax.Array, ...]:
        return jax.vmap(lambda x_D: project(x_D, [layers[name] for name in names], kernels, i))(x_NxD)

    with jax.named_scope("attention"):
        normed_NxD = rms_norm(x_NxD, _at(layers["attn_norm"], i), cfg.norm_eps)
        q_NxHxd, k_NxHxd, v_NxHxd = _rotated(products(normed_NxD, "q", "k", "v"), rope, cfg)
        entries = KVCache(k_NxHxd.swapaxes(0, 1), v_NxHxd.swapaxes(0, 1))
        x_NxD = x_NxD + products(attend(q_NxHxd, *entries).reshape(len(x_NxD), -1), "o")[0]
    with jax.named_scope("mlp"):
        normed_NxD = rms_norm(x_NxD, _at(layers["mlp_norm"], i), cfg.norm_eps)
        hidden_NxF = gated_hidden(normed_NxD, layers["gate"], layers["up"], kernels, i)
        x_NxD = x_NxD + products(hidden_NxF, "down")[0]
    return x_NxD, entries


def prefill(
    weights: Weights,
    tokens_S: jax.Array,
    cfg: LlamaConfig,
    attend: Callable[..., jax.Array] = causal_attention,
) -> tuple[jax.Array, KVCache]:
    """One causal pass over a sequence, dense unless `attend` (q [S, H, d], k and v [Hkv, S, d]) is given.

    Returns the final-norm hidden states [S, D] (float32) and the cache [L, Hkv, S, d].
    """
    rope = rope_at(jnp.arange(tokens_S.shape[0]), cfg)

    def block(x_SxD: jax.Array, i: jax.Array) -> tuple[jax.Array, KVCache]:
        return _dense_layer(weights["layers"], i, x_SxD, rope, cfg, attend, "xla")

    x_SxD, cache = lax.scan(block, embed(weights, tokens_S), jnp.arange(cfg.num_layers))
    return rms_norm(x_SxD, weights["final_norm"], cfg.norm_eps), cache


def extend(
    weights: Weights, tokens_N: jax.Array, cache: KVCache, length: jax.Array, cfg: LlamaConfig
) -> tuple[jax.Array, KVCache]:
    """One dense causal pass over the tokens that follow the first `length` entries of a dense cache.

    Returns the tokens' final-norm hidden states [N, D] (float32) and their entries [L, Hkv, N, d].
    """
    N, Hkv = tokens_N.shape[0], cfg.num_kv_heads
    rope = rope_at(length + jnp.arange(N), cfg)
    # The kernels of GPUs and TPUs are for the few rows of a decode step.
    kernels = cfg.kernels if current_platform() == "cpu" and cfg.kernels in ("auto", "native") else "xla"
    page_size = 64  # of any size: all are kept
    everything_1x1xP = jnp.ones((1, 1, -(-cache.k.shape[2] // page_size)), bool)

    def block(x_NxD: jax.Array, i: jax.Array) -> tuple[jax.Array, KVCache]:
        def mix(q_NxHxd: jax.Array, k_HxNxd: jax.Array, v_HxNxd: jax.Array) -> jax.Array:
            def one(q_Hxd: jax.Array, before_N: jax.Array) -> jax.Array:
                return attend(
                    q_Hxd.reshape(Hkv, cfg.group_size, -1),
                    cache,
                    (k_HxNxd, v_HxNxd),
                    everything_1x1xP,
                    before_N[None, None],
                    length,
                    page_size,
                    layer=i,
                    implementation=kernels,
                )

            return jax.vmap(one)(q_NxHxd, jnp.tri(N, dtype=bool))

        return _dense_layer(weights["layers"], i, x_NxD, rope, cfg, mix, kernels)

    x_NxD, entries = lax.scan(block, embed(weights, tokens_N, kernels), jnp.arange(cfg.num_layers))
    return rms_norm(x_NxD, weights["final_norm"], cfg.norm_eps), entries


def append(cache: KVCache, entries: KVCache, length: jax.Array, kernels: str = "xla") -> KVCache:
    """`cache` with `entries` [L, Hkv, N, d] (of `extend`, or a suffix') after its first `length`."""
    by_layer = jax.vmap(functools.partial(put, start=length, implementation=kernels))
    return KVCache(*(by_layer(old, new) for old, new in zip(cache, entries, strict=True)))


def index_cache(cache: KVCache, axes: tuple[Axis, ...]) -> IndexedCache:
    """A dense cache with what each axis keeps about its keys, for all that decode against it."""
    return IndexedCache(cache, tuple(jax.vmap(axis.index_prefix)(cache.k) for axis in effective(axes)))


def update_index(
    axis_index: tuple[Any, ...], cache: KVCache, start: jax.Array, count: int, axes: tuple[Axis, ...]
) -> tuple[Any, ...]:
    """What each axis keeps about the keys of `cache`, of which `count` from `start` on are new."""

    def update(axis: Axis, index: Any) -> Any:
        return jax.vmap(lambda of_layer, k: axis.update_prefix(of_layer, k, start, count))(index, cache.k)

    return tuple(map(update, effective(axes), axis_index))


def empty_suffix(prefix: Prefix, num_steps: int, axes: tuple[Axis, ...]) -> Suffix:
    """Room for `num_steps` entries after `prefix`."""
    L, Hkv, _, d = prefix.cache.k.shape
    blank = jnp.zeros((L, Hkv, num_steps, d), prefix.cache.k.dtype)

    def index(axis: Axis, prefix_index: Any) -> Any:
        def of_layer(layer_index: Any, k_HxSxd: jax.Array, k_HxTxd: jax.Array) -> Any:
            return axis.index_suffix(layer_index, KeysInReach(k_HxSxd, k_HxTxd, prefix.length, jnp.int32(0)))

        return jax.vmap(of_layer)(prefix_index, prefix.cache.k, blank)

    axis_index = tuple(map(index, effective(axes), prefix.axis_index))
    return jax.tree.map(as_bits, Suffix(KVCache(blank, blank), axis_index))


def decode_step(
    weights: Weights,
    prefix: Prefix,
    suffix: Suffix,
    token: jax.Array,
    step: jax.Array,
    action_X: jax.Array,
    axes: tuple[Axis, ...],
    cfg: LlamaConfig,
) -> tuple[jax.Array, Suffix]:
    """Consumes `token` at position `prefix.length + step` under the levels `action_X` (one per axis).

    Returns the final-norm hidden state [D] (float32) and the suffix with this step's entries, which are
    those of the *compressed* step: later steps see them (docs/method.md, "The episode").
    """
    rope, layers, axes = rope_at(prefix.length + step, cfg), weights["layers"], effective(axes)
    # A layer ends with the norm of what follows it, for an axis may take that and the residual add along.
    next_norm_LxD = jnp.concatenate([layers["attn_norm"][1:], weights["final_norm"][None]])

    def block(carry: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple, Written]:
        x_D, normed_D = carry
        with jax.named_scope("attention"):
            parts = project(normed_D, (layers["q"], layers["k"], layers["v"]), cfg.kernels, i)
            q_Hxd, k_Hxd, v_Hxd = _rotated(parts, rope, cfg)
            q_HxGxd = q_Hxd.reshape(cfg.num_kv_heads, cfg.group_size, cfg.head_size)
            entry, suffix_kv = KVCache(k_Hxd, v_Hxd), _at(suffix.cache, i)
            suffix_kv = KVCache(
                *(_put_token(old, new, step) for old, new in zip(suffix_kv, entry, strict=True))
            )
            keys = KeysInReach(_at(prefix.cache.k, i), suffix_kv.k, prefix.length, step)
            suffix_index = tuple(
                axis.index_token(_at(stacked, i), k_Hxd, keys)
                for axis, stacked in zip(axes, suffix.axis_index, strict=True)
            )
            S, keep = prefix.cache.k.shape[2], None
            for x, axis, value in acting(axes, action_X, "keys"):
                chosen = axis.select(value, q_HxGxd, keys, prefix.axis_index[x], suffix_index[x], i)
                keep = chosen if keep is None else keep.both(chosen, S)
            keep = keys.valid if keep is None else keep._replace(suffix=keep.suffix & keys.valid.suffix)
            mixed_HxGxd = attend(
                q_HxGxd,
                prefix.cache,
                suffix_kv,
                keep.prefix,
                keep.suffix,
                prefix.length,
                keep.page_size,
                layer=i,
                implementation=cfg.kernels,
            )
            x_D = x_D + project(mixed_HxGxd.reshape(-1), (layers["o"],), cfg.kernels, i)[0]
        with jax.named_scope("mlp"):
            y_D = mlp_input(axes, action_X, x_D, _at(layers["mlp_norm"], i), cfg.norm_eps)
            hidden_F = gated_hidden(y_D, layers["gate"], layers["up"], cfg.kernels, i)
            y_D = project(hidden_F, (layers["down"],), cfg.kernels, i)[0]
            x_D, normed_D = mlp_output(axes, action_X, y_D, x_D, _at(next_norm_LxD, i), cfg.norm_eps)
        return (x_D, normed_D), jax.tree.map(as_bits, Written(entry, suffix_index))

    x_D = embed(weights, token, cfg.kernels)
    start = x_D, rms_norm(x_D, layers["attn_norm"][0], cfg.norm_eps)
    (_, normed_D), written = lax.scan(block, start, jnp.arange(cfg.num_layers))
    return normed_D, suffix.with_token(written, step)


def _at(tree: Any, i: jax.Array) -> Any:
    """Layer `i` of stacked arrays (bits or not).

    Weights and caches are read so, by index inside the loop over layers, rather than scanned: scanned
    arrays must lead with the layer, and vmap leads with the batch, so every step would transpose them.
    """

    def take(stacked: jax.Array) -> jax.Array:
        layer = take_layer(stacked, i)
        return as_numbers(layer, jnp.bfloat16) if layer.dtype == jnp.uint16 else layer

    return jax.tree.map(take, tree)


def _put_token(old_HxTxd: jax.Array, new_Hxd: jax.Array, step: jax.Array) -> jax.Array:
    """Entries `old` [..., H, T, d] with `new` [..., H, d] as that of one step; rows of any vmap at once."""
    here_T = jnp.arange(old_HxTxd.shape[-2]) == step
    bits = jnp.where(here_T[:, None], as_bits(new_Hxd)[..., None, :], as_bits(old_HxTxd))
    return as_numbers(bits, new_Hxd.dtype)
