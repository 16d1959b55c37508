"""Kernels at the named shapes, decode steps and generation, as abstract programs that checks compile.

Everything is abstract: no array is made.  Call `make` of a program where ops are traced for its chip.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.attention_cases import attention, bounds, choice, shared_prefix
from experiments.benchmarks.compile_check import Check, Program
from experiments.benchmarks.kernel_cases import KernelCase
from experiments.benchmarks.kernel_steps import HORIZON, MODELS, SHAPE, axes
from experiments.benchmarks.mlp_cases import pruned_mlp, rounding
from pallas_kernels import quest
from pallas_kernels.attention import paged_attention
from pallas_kernels.shapes import SHAPES, Shape, distinct
from sol_jax.axes.base import ActionSpace
from sol_jax.generation import episodes
from sol_jax.generation.episodes import Decoder, TextState
from sol_jax.models import llama
from sol_jax.models.llama import KVCache
from sol_jax.rl.config import EpisodeConfig
from sol_jax.rl.policy import Policy, PolicySpec, example_observation, initial_carry
from sol_jax.rl.rollout import EpisodeRules

SCHEDULES = 16
LONGEST = 1 << 16  # cached tokens of a row with more schedules than one
STAGES = ("start", "play", "renew")  # the programs of generation


def size_of(tree: Any) -> int:
    """Bytes of arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def abstract(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# --- kernels ------------------------------------------------------------------------------------


def kernels() -> list[Check]:
    """Every kernel at every named shape in bfloat16, and in float32 at one of each model and page."""
    found = []
    for dtype, shapes in (("bfloat16", SHAPES), ("float32", distinct("name", "page_size"))):
        for shape in shapes:
            quick = shape in distinct("name")[:1] or str(shape) == "llama-3.1-8b-8x1024-p8"
            for op, make in _of_shape(shape, dtype):
                found.append(Check(f"{op} {dtype}", functools.partial(_of_case, make), quick=quick))
    for shape in distinct("name"):
        for dtype in ("bfloat16", "float32"):
            for rows in (1, 2, 3):
                case = functools.partial(pruned_mlp, shape, rows, (0.4,), dtype, smoke=True)
                name = f"gated_hidden {shape.name} {rows} rows {dtype}"
                found.append(Check(name, functools.partial(_of_case, case), quick=rows == 1))
        for rows in (1, 128):
            case = functools.partial(rounding, shape, rows, (5,), smoke=True)
            name = f"quantize_residual {shape.name} {rows} rows"
            found.append(Check(name, functools.partial(_of_case, case), quick=rows == 1))
    return found


def _of_shape(shape: Shape, dtype: str) -> Iterator[tuple[str, Callable[[], KernelCase]]]:
    """The operations of attention at a shape, by name."""
    more: dict[str, Any] = {"dtype": dtype, "smoke": True}
    yield f"attend {shape}", functools.partial(attention, shape, (0.3,), **more)
    yield f"select_pages {shape}", functools.partial(choice, shape, (0.3,), **more)
    yield f"page_bounds {shape}", functools.partial(bounds, shape, **more)
    if shape.context <= LONGEST and shape.batch <= 8:
        name = f"shared_prefix {shape} K={SCHEDULES}"
        yield name, functools.partial(shared_prefix, shape, SCHEDULES, (0.3,), **more)


def _of_case(make: Callable[[], KernelCase]) -> Program:
    """The kernel of a case that benchmarks measure, its arrays left out."""
    cases = []

    def arrays() -> Any:
        case = make()
        cases.append(case)
        return next(iter(case.actions.values()))[0], case.buffers[0]

    args = jax.eval_shape(arrays)
    return cases[0].variants["pallas"].call, args, ()


# --- the largest blocks that `pallas_kernels.tuning.TABLE` lets a kernel have ---------------------


def attended(rows: int, page: int, d: int, dtype: str) -> Program:
    """Attention of so many rows of a key/value head."""
    H, G, S = 2, 4, 4096
    K = rows // G

    def call(q: Any, k: Any, v: Any, keep: Any) -> Any:
        def one(q: Any, keep: Any) -> Any:
            return paged_attention(q, (k, v), keep, jnp.int32(S), page, implementation="pallas")

        return jax.vmap(one)(q, keep)

    cache = abstract(H, S, d, dtype=dtype)
    masks = abstract(K, H, G, S // page, dtype=bool)
    return call, (abstract(K, H, G, d, dtype=dtype), cache, cache, masks), ()


def chosen(pages: int, rows: int) -> Program:
    """The choice among so many pages by so many rows."""
    H, G, d = 2, 4, 128

    def call(q: Any, bounds: Any, used: Any, count: Any) -> Any:
        def one(q: Any, count: Any) -> Any:
            return quest.select_pages(q, (bounds,), (used,), count, implementation="pallas")

        return jax.vmap(one)(q, count)

    K = rows // G
    return (
        call,
        (
            abstract(K, H, G, d, dtype=jnp.bfloat16),
            abstract(H, pages, 2 * d, dtype=jnp.bfloat16),
            abstract(pages, dtype=bool),
            abstract(K),
        ),
        (),
    )


def bounded(page: int, d: int) -> Program:
    """Bounds of pages of so many tokens and channels."""

    def call(k: Any, valid: Any) -> Any:
        return quest.page_bounds(k, valid, page, "pallas")

    return call, (abstract(2, 16 * page, d, dtype=jnp.float32), abstract(16 * page, dtype=bool)), ()


# --- decode steps -------------------------------------------------------------------------------


def caches(name: str, batch: int, tokens: int) -> KVCache:
    """Abstract, of a batch."""
    cfg = MODELS[name]
    size = (batch, cfg.num_layers, cfg.num_kv_heads, tokens, cfg.head_size)
    part: Any = abstract(*size, dtype=cfg.dtype)
    return KVCache(part, part)


def decode_step(name: str, batch: int, K: int, context: int, implementation: str) -> Program:
    """One step of K schedules of each sequence, and its vocabulary logits; suffixes are donated."""
    cfg = dataclasses.replace(MODELS[name], kernels=implementation)
    using = axes(implementation, SHAPE[name].page_size)

    def step(weights: Any, cache_B: Any, index_B: Any, suffix_BxK: Any, token_BxK: Any, action: Any) -> Any:
        def sequence(cache: Any, index: Any, suffix_K: Any, token_K: Any, action_KxX: Any) -> Any:
            prefix = llama.Prefix(cache, index, jnp.int32(context))

            def schedule(suffix: Any, token: Any, action_X: Any) -> Any:
                return llama.decode_step(weights, prefix, suffix, token, jnp.int32(3), action_X, using, cfg)

            return jax.vmap(schedule)(suffix_K, token_K, action_KxX)

        hidden, suffix_BxK = jax.vmap(sequence)(cache_B, index_B, suffix_BxK, token_BxK, action)
        return llama.logits(weights, hidden, implementation), suffix_BxK

    cache_B = caches(name, batch, context)

    def room(cache_B: Any) -> Any:
        def sequence(cache: Any) -> Any:
            indexed = llama.index_cache(cache, using)
            suffix = llama.empty_suffix(indexed.prefix(jnp.int32(context)), HORIZON, using)
            return indexed.axis_index, jax.tree.map(lambda leaf: jnp.repeat(leaf[None], K, 0), suffix)

        return jax.vmap(sequence)(cache_B)

    index_B, suffix_BxK = jax.eval_shape(room, cache_B)
    own = abstract(batch, K), abstract(batch, K, len(using), dtype=jnp.float32)
    return step, (llama.abstract_weights(cfg), cache_B, index_B, suffix_BxK, *own), (3,)


# --- generation ---------------------------------------------------------------------------------


def generation(name: str, batch: int, prompt: int, implementation: str, stage: str) -> Program:
    """One of the jitted functions of `sol_jax.generation.episodes`."""
    cfg = dataclasses.replace(MODELS[name], kernels=implementation)
    space = ActionSpace(axes(implementation, SHAPE[name].page_size))
    spec = PolicySpec(cfg.hidden_size, space.num_actions, HORIZON)
    decoder = Decoder(EpisodeRules(cfg, space, EpisodeConfig(horizon=HORIZON)), spec, prefill_batch=1)
    weights, capacity = llama.abstract_weights(cfg), prompt + 16 * HORIZON
    key_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))

    def start(weights: Any, tokens_BxS: Any, length_B: Any, key_B: Any) -> TextState:
        # Without its jit, which would reuse what it traced for another platform.
        begin: Any = episodes.start
        return begin.__wrapped__(weights, tokens_BxS, length_B, key_B, capacity, decoder)

    prompts = abstract(batch, prompt), abstract(batch), key_B
    if stage == "start":
        return start, (weights, *prompts), ()
    text_B = jax.eval_shape(start, weights, *prompts)
    if stage == "renew":
        late = dataclasses.replace(decoder, refresh_every=4)
        renew: Any = episodes.renew
        return (
            lambda weights, text_B, consumed: renew.__wrapped__(weights, text_B, consumed, late),
            (weights, text_B, abstract(batch, 4 * HORIZON)),
            (1,),
        )
    params = jax.eval_shape(lambda: init_params(spec))
    asked = abstract(batch, len(space.axes), dtype=jnp.float32), abstract(batch, HORIZON)
    play: Any = episodes.play

    def episode(weights: Any, params: Any, text_B: Any, budget: Any, plan: Any) -> Any:
        return play.__wrapped__(weights, params, text_B, budget, plan, decoder)

    return episode, (weights, params, text_B, *asked), (2,)


def init_params(spec: PolicySpec) -> Any:
    """Fresh parameters of a policy."""
    return Policy(spec).init(jax.random.key(0), example_observation(spec), initial_carry(spec), method="step")
