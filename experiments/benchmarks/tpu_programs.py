"""What `tpu_check` compiles: kernels at the named shapes, and the programs of training and generation.

Everything is abstract: no array is made.  `once` are the bytes that a program makes and holds by its nature
(the caches that a prefill fills), or that XLA copies for want of another way (see `turned`); `never` those
that must not be there twice: the smaller of weights and caches.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.attention_cases import attention, bounds, choice, shared_prefix
from experiments.benchmarks.kernel_cases import KernelCase
from experiments.benchmarks.kernel_steps import HORIZON, MODELS, SHAPE, axes
from experiments.benchmarks.mlp_cases import pruned_mlp, rounding
from experiments.benchmarks.plans import config_of
from pallas_kernels import quest
from pallas_kernels.attention import paged_attention
from pallas_kernels.shapes import SHAPES, distinct
from sol_jax.axes.base import ActionSpace
from sol_jax.generation import episodes
from sol_jax.generation.episodes import Decoder, TextState
from sol_jax.models import llama
from sol_jax.models.llama import KVCache
from sol_jax.planning.known_models import architecture
from sol_jax.planning.plan import shares_of
from sol_jax.planning.programs import learn_program, play_program, row_on
from sol_jax.planning.sizes import Shares, cache_bytes, played_bytes, weight_bytes
from sol_jax.planning.topology import Topology, parse_topology
from sol_jax.rl.config import EpisodeConfig
from sol_jax.rl.policy import Policy, PolicySpec, example_observation, initial_carry
from sol_jax.rl.rollout import EpisodeRules
from sol_jax.runs.config import RunConfig

Program = tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]  # function, abstract arguments, donated
SCHEDULES = 16
LITTLE = 64 << 20  # bytes: what a policy takes while it learns
LANES = 128  # of a TPU
LONGEST = 1 << 16  # cached tokens of a row with more schedules than one


@dataclasses.dataclass(frozen=True)
class Check:
    """One program; `make` is called where ops are traced for a TPU.

    `on` is of programs on a mesh: their arguments say where on a topology they lie.
    """

    name: str
    make: Callable[[], Program] | None = None
    on: Callable[[Topology], Program] | None = None
    once: int = 0
    never: int | None = None  # None: of a kernel, whose operands are measured
    quick: bool = False  # among those that CI compiles


def size_of(tree: Any) -> int:
    """Bytes of arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def abstract(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def checks() -> list[Check]:
    """All of them, those of kernels first."""
    return [*kernels(), *steps(), *updates(), *generations()]


# --- kernels ------------------------------------------------------------------------------------


def kernels() -> list[Check]:
    """Every kernel at every named shape in bfloat16, and in float32 at one of each model and page."""
    found = []
    for dtype, shapes in (("bfloat16", SHAPES), ("float32", distinct("name", "page_size"))):
        for shape in shapes:
            quick = shape in distinct("name")[:1] or str(shape) == "llama-3.1-8b-8x1024-p8"

            def add(op: str, make: Callable[[], KernelCase], quick: bool = quick, dtype: str = dtype) -> None:
                label = f"{op} {dtype}"
                found.append(Check(label, functools.partial(_of_case, make), quick=quick))

            more: dict[str, Any] = {"dtype": dtype, "smoke": True}
            add(f"attend {shape}", functools.partial(attention, shape, (0.3,), **more))
            add(f"select_pages {shape}", functools.partial(choice, shape, (0.3,), **more))
            add(f"page_bounds {shape}", functools.partial(bounds, shape, **more))
            if shape.context <= LONGEST and shape.batch <= 8:
                add(
                    f"shared_prefix {shape} K={SCHEDULES}",
                    functools.partial(shared_prefix, shape, SCHEDULES, (0.3,), **more),
                )
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
    found += [Check(name, make, quick=True) for name, make in _edges()]
    return found


def _of_case(make: Callable[[], KernelCase]) -> Program:
    """The kernel of a case that benchmarks measure, its arrays left out."""
    cases = []

    def arrays() -> Any:
        case = make()
        cases.append(case)
        return next(iter(case.actions.values()))[0], case.buffers[0]

    args = jax.eval_shape(arrays)
    return cases[0].variants["pallas"].call, args, ()


def _edges() -> list[tuple[str, Callable[[], Program]]]:
    """The largest blocks that `pallas_kernels.tuning.TABLE` lets a kernel have."""

    def attended(rows: int, page: int, d: int, dtype: str) -> Program:
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
        def call(k: Any, valid: Any) -> Any:
            return quest.page_bounds(k, valid, page, "pallas")

        return call, (abstract(2, 16 * page, d, dtype=jnp.float32), abstract(16 * page, dtype=bool)), ()

    found: list[tuple[str, Callable[[], Program]]] = []
    for rows in (16, 512):
        for page, d, dtype in ((64, 128, "float32"), (256, 256, "float32"), (256, 256, "bfloat16")):
            name = f"attend {rows} rows, pages of {page}, {d} channels {dtype}"
            found.append((name, functools.partial(attended, rows, page, d, dtype)))
    for pages, rows in ((32768, 16), (4096, 128), (1024, 512)):
        found.append((f"select_pages {pages} pages, {rows} rows", functools.partial(chosen, pages, rows)))
    found.append(("page_bounds pages of 256, 256 channels float32", functools.partial(bounded, 256, 256)))
    return found


# --- decode steps -------------------------------------------------------------------------------


def caches(name: str, batch: int, tokens: int) -> KVCache:
    """Abstract, of a batch."""
    cfg = MODELS[name]
    size = (batch, cfg.num_layers, cfg.num_kv_heads, tokens, cfg.head_size)
    part: Any = abstract(*size, dtype=cfg.dtype)
    return KVCache(part, part)


def turned(name: str, size: int) -> int:
    """Bytes of a copy of caches of so many bytes with the channels of a head innermost; 0 if none is needed.

    JAX keeps heads of fewer channels than a TPU has lanes with the tokens innermost.  Turned around, as
    kernels read them and a token is written, their channels are padded to all lanes.
    """
    channels = MODELS[name].head_size
    return size * LANES // channels if channels < LANES else 0


def steps() -> list[Check]:
    """Decode steps of one sequence, of several, and of schedules that share a prefix."""
    small, one, three, eight = (name for name in MODELS if name != "tiny")
    loads = [(eight, 1, 1, 8192), (eight, 2, SCHEDULES, 1024), (three, 4, 1, 1024), (one, 8, SCHEDULES, 1024)]
    found = []
    for name, batch, K, context in [*loads, (small, 8, SCHEDULES, 1024)]:
        for implementation in ("xla", "pallas"):
            make = functools.partial(decode_step, name, batch, K, context, implementation)
            prefix = size_of(caches(name, batch, context))
            never = min(size_of(llama.abstract_weights(MODELS[name])), prefix)
            # Suffixes come and go in JAX's layout, and are read in another: rollouts have them in that one.
            once = 2 * turned(name, size_of(caches(name, batch * K, HORIZON)))
            if implementation == "pallas":
                once += turned(name, prefix)
            label = f"decode_step {name} {batch}x{K}x{context} {implementation}"
            found.append(Check(label, make, once=once, never=never, quick=name == three))
    return found


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


# --- updates ------------------------------------------------------------------------------------


def updates() -> list[Check]:
    """Both programs of an update on a mesh: rows of one device, and an 8B model on rows of two."""
    found = []
    for name, model in (("sol_j_fl:1b", 1), ("sol_j_fl:8b", 2)):
        fields = {"model.dtype": "bfloat16", "mesh.model": model, "mesh.chunk": 1}
        config = config_of(name).with_fields(fields)

        def shares(topology: Topology, config: RunConfig = config) -> Shares:
            return shares_of(config, topology, architecture(config.model.path, config.model.dtype))

        def playing(topology: Topology, shares: Any = shares) -> Program:
            return *play_program(shares(topology), row_on(topology, shares(topology))), ()

        def learning(topology: Topology, shares: Any = shares) -> Program:
            return *learn_program(shares(topology), row_on(topology, shares(topology))), (0,)

        setup = shares(parse_topology("v5e:2x2")).setup
        label = f"{name} bfloat16, model {model}"
        caches, weights = int(cache_bytes(setup) / model), int(weight_bytes(setup, model))
        found.append(Check(f"play {label}", on=playing, once=caches, never=weights, quick=model == 2))
        # Besides what was played: a minibatch in the policy, and gradients.
        played = int(played_bytes(setup))
        # The policy's gradient takes the compiler minutes: nothing for CI.
        found.append(Check(f"learn {label}", on=learning, once=LITTLE, never=played))
    return found


# --- generation ---------------------------------------------------------------------------------


def generations() -> list[Check]:
    """The three programs of generation: a prompt, an episode with its refresh, and a late refresh."""
    found = []
    for name, batch, prompt in (("llama-3.1-8b", 1, 4096), ("llama-3.2-1b", 8, 1024)):
        weights = size_of(llama.abstract_weights(MODELS[name]))
        held = size_of(caches(name, batch, prompt + 16 * HORIZON))
        for implementation in ("xla", "pallas"):
            for stage in ("start", "play", "renew"):
                make = functools.partial(generation, name, batch, prompt, implementation, stage)
                label = f"generate {stage} {name} {batch}x{prompt} {implementation}"
                # The scores of a prompt, in float32, as weights and rounded, are there at once.
                once = held + 10 * MODELS[name].num_heads * prompt**2 if stage == "start" else 0
                once += turned(name, held)
                found.append(Check(label, make, once=once, never=min(weights, held)))
    return found


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
