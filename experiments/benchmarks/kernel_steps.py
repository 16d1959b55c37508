"""End to end: decode steps, whole generations and GRPO updates of Llama's shapes, random weights, bfloat16.

Bytes and operations are what `sol_jax.costs.decode_step` counts, several rows taken to keep independent
channels.  But of the cache a kernel reads the pages that some head of a group chose, whose share is realised
on random queries and keys (`page_union`; it is the column `kept`).  The heads of a trained model agree more:
SmolLM2's read 0.16, 0.30, 0.55 and 0.75 at keep 0.1, 0.2, 0.4 and 0.6, random ones of its shape 0.24, 0.42,
0.71 and 0.88.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from experiments.benchmarks.attention_cases import bounds_of, choose
from experiments.benchmarks.kernel_cases import KernelWork, normals
from pallas_kernels import dispatch
from pallas_kernels.gated_mlp import MAX_ROWS
from pallas_kernels.shapes import Shape, distinct
from sol_jax.axes.base import ActionSpace, Axis
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.costs import decode_step as costs
from sol_jax.costs import update as flops
from sol_jax.generation import episodes as decoding
from sol_jax.generation.episodes import Decoder
from sol_jax.models import llama
from sol_jax.models.llama import KVCache, LlamaConfig
from sol_jax.rl.collect import prefill_blocks, run_schedules
from sol_jax.rl.config import EpisodeConfig, GrpoConfig, MemoryConfig
from sol_jax.rl.policy import PolicySpec
from sol_jax.rl.rollout import Controller, EpisodeRules, policy_controller
from sol_jax.rl.setup import Setup
from sol_jax.rl.train_step import init_state, train_step

Rows = list[dict[str, Any]]
Choice = tuple[str, tuple[float, ...]]  # kernels, and the levels of an action
IMPLEMENTATIONS = ("xla", "pallas")  # those that are compared; auto takes what was measured to pay

TINY = Shape("tiny", 32, 64, 4, 2, 8, 2, 48, 8)
SHAPE = {shape.name: shape for shape in (*distinct("name"), TINY)}


def whole_model(name: str, num_layers: int, vocab_size: int, theta: float, tie: bool = True) -> LlamaConfig:
    """A model of the table of shapes, with what one layer does not tell."""
    shape = SHAPE[name]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        ffn_size=shape.ffn,
        num_layers=num_layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        max_position=131072,
        rope_theta=theta,
        norm_eps=1e-5,
        tie_embeddings=tie,
        dtype="bfloat16",
    )


MODELS = {
    "smollm2-135m": whole_model("smollm2-135m", 30, 49152, 1e5),
    "llama-3.2-1b": whole_model("llama-3.2-1b", 16, 128256, 5e5),
    "llama-3.2-3b": whole_model("llama-3.2-3b", 28, 128256, 5e5),
    "llama-3.1-8b": whole_model("llama-3.1-8b", 32, 128256, 5e5, tie=False),
    "tiny": whole_model("tiny", 2, 64, 1e4),
}
SMOLLM2 = dataclasses.replace(MODELS["smollm2-135m"], dtype="float32", max_position=8192)
TOP = (1.0, 1.0, 16.0)
ACTIONS = ((0.1, 0.4, 8.0), (0.3, 0.4, 8.0), (0.6, 0.7, 8.0), TOP)
STEPS = 4  # decode steps of one timed run
HORIZON = 16


def axes(kernels: str, page_size: int = 16) -> tuple[Axis, ...]:
    """Three levels an axis, as in SOL-J 3L."""
    found: tuple[Axis, ...] = (
        Quest((0.1, 0.3, 0.6, 1.0), (0.1, 1.0), 100.0, page_size=page_size),
        ChannelPruning((0.4, 0.7, 1.0), (0.4, 1.0), 100.0),
        OutputQuantization((8.0, 16.0), (0.5, 1.0), 200.0),
    )
    return tuple(dataclasses.replace(axis, kernels=kernels) for axis in found)


def jobs(smoke: bool) -> list[tuple[str, Callable[[int], Rows]]]:
    """What is measured, the most important first; each takes the number of timed rounds."""
    if smoke:
        return [
            ("decode_step tiny", lambda rounds: decode_steps("tiny", 2, 48, rounds)),
            ("update tiny", lambda rounds: updates("tiny", 2, 2, 40, rounds)),
            ("generation tiny", lambda rounds: generations("tiny", 1, 40, 2, rounds)),
        ]
    small, one, three, eight = (name for name in MODELS if name != "tiny")
    # Updates and generations take about a second each: fewer rounds, which their rows say.
    return [
        (f"decode_step {eight}-8x32768", lambda rounds: decode_steps(eight, 8, 32768, rounds)),
        (f"update {eight}-8x1024-K16", lambda rounds: updates(eight, 8, 16, 1024, rounds // 6)),
        (f"decode_step {one}-8x131072", lambda rounds: decode_steps(one, 8, 131072, rounds)),
        (f"update {one}-8x1024-K16", lambda rounds: updates(one, 8, 16, 1024, rounds // 6)),
        (f"decode_step {eight}-1x8192", lambda rounds: decode_steps(eight, 1, 8192, rounds)),
        (f"generation {eight}-1x4096", lambda rounds: generations(eight, 1, 4096, 8, rounds // 6)),
        (f"generation {one}-1x4096", lambda rounds: generations(one, 1, 4096, 8, rounds // 6)),
        (f"decode_step {one}-128x1024", lambda rounds: decode_steps(one, 128, 1024, rounds)),
        (f"decode_step {three}-8x8192", lambda rounds: decode_steps(three, 8, 8192, rounds)),
        (f"decode_step {small}-8x1024", lambda rounds: decode_steps(small, 8, 1024, rounds)),
    ]


def random_weights(cfg: LlamaConfig) -> Any:
    return jax.block_until_ready(jax.jit(functools.partial(llama.init_weights, cfg=cfg))(jax.random.key(0)))


def row(op: str, shape: str, action: str, name: str, seconds: float, work: KernelWork, **more: Any) -> dict:
    """One row of the table, without what follows from the time."""
    found: dict[str, Any] = {"op": op, "shape": shape, "action": action, "implementation": name}
    found |= {"peer": 0, "note": "", "seconds": seconds, "bytes": work.bytes, "flops": work.flops}
    return found | more


def label(levels: Sequence[float]) -> str:
    """An action's, in the CSV."""
    return " ".join(f"{level:g}" for level in levels) or "dense"


def read_share(kernels: str, keep: float, batch: int, context: int, name: str) -> float:
    """Of a layer's cache, what is read of it: all, but by a kernel that goes by lists of pages."""
    shape = SHAPE[name]
    facts: dict[str, Any] = {"rows": shape.group_size, "tokens": batch * context}
    facts |= {"head_size": shape.head_size, "page_size": shape.page_size}
    if keep == 1.0 or dispatch.choose("paged_attention", kernels, **facts) == "xla":
        return 1.0
    return page_union(keep, context, shape)


@functools.cache
def page_union(keep: float, context: int, shape: Shape) -> float:
    """Realised share of the pages that some head of a group chooses, of normal queries and keys.

    What the layers of a model of random weights have; a context's length matters little to it.
    """
    H, d = shape.kv_heads, shape.head_size
    bounds_1xHxPx2d = bounds_of(normals(0, 1, H, min(context, 8192), d), shape.page_size)
    pages = jnp.int32(math.ceil(keep * bounds_1xHxPx2d.shape[2]))
    keep_HxGxP = choose(normals(1, H, shape.group_size, d), bounds_1xHxPx2d[0], pages, "xla")
    return float(jnp.mean(jnp.any(keep_HxGxP, 1)))


def step_work(
    levels: Sequence[float], batch: int, kv_len: int, cfg: LlamaConfig, using: Any, read: float | None = None
) -> KernelWork:
    """One decode step of a batch: weights are read once, caches by every row.

    `read` is the share of the cache; None: what `costs` takes, at worst other pages for every head.
    """
    cost, dense = costs.step_cost(levels, kv_len, cfg, using), costs.dense_step(kv_len, cfg)
    if read is not None:
        cost = dataclasses.replace(cost, cache=cost.cache._replace(bytes=read * dense.cache.bytes))
    shared = (cost.attention, cost.gate_up, cost.down, cost.head)
    own = (cost.cache, cost.index, cost.mlp_output)
    total = sum(part.bytes for part in shared) + batch * sum(part.bytes for part in own)
    # Rows keep nearly independent channels, and many rows take the dense product.
    share = cost.gate_up.bytes / dense.gate_up.bytes
    union = 1.0 if batch > MAX_ROWS["pallas"] else 1 - (1 - share) ** batch
    total += (union - share) * dense.gate_up.bytes
    return KernelWork(total, batch * sum(part.flops for part in (*shared, *own)))


def decode_steps(name: str, batch: int, context: int, rounds: int) -> Rows:
    """One step of a batch with its vocabulary logits, against a cache of random entries."""
    cfg, page = MODELS[name], SHAPE[name].page_size
    weights, shape = random_weights(cfg), f"{name}-{batch}x{context}"
    size = (batch, cfg.num_layers, cfg.num_kv_heads, context, cfg.head_size)
    draw = jax.jit(lambda key: jax.random.normal(key, size, jnp.bfloat16))
    cache_B = KVCache(draw(jax.random.key(1)), draw(jax.random.key(2)))
    token_B = jax.random.randint(jax.random.key(3), (batch,), 0, cfg.vocab_size)

    def prepared(kernels: str, using: tuple[Axis, ...]) -> tuple[Any, Any]:
        """The compiled steps, and their prefixes, which share the one cache."""
        model = dataclasses.replace(cfg, kernels=kernels)

        @jax.jit
        def index(cache_B: KVCache) -> Any:
            def one(cache: KVCache) -> Any:
                return llama.index_cache(cache, using).axis_index

            return jax.vmap(one)(cache_B)

        def run(weights: Any, cache_B: KVCache, index_B: Any, token_B: jax.Array, action_X: jax.Array) -> Any:
            def start(cache: KVCache, index: Any) -> Any:
                return llama.empty_suffix(llama.Prefix(cache, index, jnp.int32(context)), HORIZON, using)

            def one(cache: KVCache, index: Any, suffix: Any, token: jax.Array, step: jax.Array) -> Any:
                prefix = llama.Prefix(cache, index, jnp.int32(context))
                return llama.decode_step(weights, prefix, suffix, token, step, action_X, using, model)

            def step(carry: Any, t: jax.Array) -> Any:
                token_B, suffix_B = carry
                hidden_BxD, suffix_B = jax.vmap(one, in_axes=(0, 0, 0, 0, None))(
                    cache_B, index_B, suffix_B, token_B, t
                )
                token_B = jnp.argmax(llama.logits(weights, hidden_BxD), -1)
                return (token_B, suffix_B), hidden_BxD

            suffix_B = jax.vmap(start)(cache_B, index_B)
            return jax.lax.scan(step, (token_B, suffix_B), jnp.arange(STEPS))[1]

        index_B = index(cache_B)
        action = jnp.zeros(len(using), jnp.float32)
        return jax.jit(run).lower(weights, cache_B, index_B, token_B, action).compile(), index_B

    programs = {kernels: prepared(kernels, axes(kernels, page)) for kernels in IMPLEMENTATIONS}
    programs["dense xla"], programs["dense dispatch"] = prepared("xla", ()), prepared("pallas", ())

    def run(kind: str, levels: tuple[float, ...]) -> Any:
        step, index_B = programs[kind]
        return step(weights, cache_B, index_B, token_B, jnp.array(levels, jnp.float32))

    dense: list[Choice] = [("dense xla", ()), ("dense dispatch", ())]
    choices = [(kernels, levels) for kernels in IMPLEMENTATIONS for levels in ACTIONS] + dense
    runs = {choice: functools.partial(run, *choice) for choice in choices}
    seconds = timing.walls(runs, rounds)
    found = []
    for kind, levels in runs:
        exact = np.asarray(run("xla" if levels else "dense xla", levels)[0])
        miss = np.linalg.norm(np.asarray(run(kind, levels)[0]) - exact) / np.linalg.norm(exact)
        kept = levels if kind == "pallas" else TOP
        read = read_share(kind, kept[0], batch, context, name)
        work = step_work(kept, batch, context + 1, cfg, axes(kind, page), read)
        more = {
            "kept": read,
            "launches": timing.count_launches(str(programs[kind][0].as_text())) / STEPS,
            "layers": cfg.num_layers,
            "error": float(miss),
            "rounds": rounds,
            "peer": int(kind == "dense xla"),
            "note": "error of the first step's hidden states against xla, relative to their norm",
        }
        took = seconds[kind, levels] / STEPS
        found.append(row("decode_step", shape, label(levels), kind, took, work, **more))
    return found


def generations(name: str, batch: int, prompt: int, episodes: int, rounds: int) -> Rows:
    """A prompt and so many episodes of text: schedules of one action with KV refresh, and densely without."""
    cfg, page = MODELS[name], SHAPE[name].page_size
    weights = random_weights(cfg)
    tokens_BxS = jax.random.randint(jax.random.key(1), (batch, prompt), 0, cfg.vocab_size)
    length_B, key_B = jnp.full(batch, prompt), jax.random.split(jax.random.key(2), batch)

    def text(kernels: str, using: tuple[Axis, ...], levels: tuple[float, ...]) -> Any:
        space = ActionSpace(using)
        model = dataclasses.replace(cfg, kernels=kernels)
        rules = EpisodeRules(model, space, EpisodeConfig(horizon=HORIZON))
        decoder = Decoder(rules, refresh=bool(using))
        of_levels = (space.values_AxX == np.array(levels, np.float32)).all(1)
        action = int(np.flatnonzero(of_levels)[0])
        plan_BxT = jnp.full((batch, HORIZON), action, jnp.int32)
        capacity = prompt + episodes * HORIZON
        rows_B = decoding.start(weights, tokens_BxS, length_B, key_B, capacity, decoder)
        for _ in range(episodes):
            budget_BxX = jnp.ones((batch, len(using)))
            rows_B, played = decoding.play(weights, None, rows_B, budget_BxX, plan_BxT, decoder)
        return played

    runs: dict[Choice, Callable[[], Any]] = {
        (kind, levels): functools.partial(text, kind, axes(kind, page), levels)
        for kind in IMPLEMENTATIONS
        for levels in (ACTIONS[0], ACTIONS[2])
    }
    runs["dense xla", ()] = functools.partial(text, "xla", (), ())
    rounds = max(rounds, 3)
    seconds = timing.walls(runs, rounds)
    shape, prefill = f"{name}-{batch}x{prompt}+{episodes * HORIZON}", costs.dense_pass(prompt, 0, cfg)
    found = []
    for kind, levels in runs:
        bytes, operations = prefill.bytes, batch * prefill.flops
        kept = levels if kind == "pallas" else TOP
        read = read_share(kind, kept[0], batch, prompt, name)
        for n in range(episodes * HORIZON):
            step = step_work(kept, batch, prompt + n + 1, cfg, axes(kind, page), read)
            bytes, operations = bytes + step.bytes, operations + step.flops
        more: dict[str, Any] = {"peer": int(kind == "dense xla"), "rounds": rounds, "kept": read}
        more["note"] = "prompt included; the dense one has no refresh"
        took = seconds[kind, levels]
        found.append(
            row("generation", shape, label(levels), kind, took, KernelWork(bytes, operations), **more)
        )
    return found


def updates(name: str, batch: int, K: int, prefix_len: int, rounds: int) -> Rows:
    """One GRPO update; and with the prefix' cache repeated for each schedule, in place of its own rollout."""
    weights, shape = random_weights(MODELS[name]), f"{name}-{batch}x{prefix_len}-K{K}"
    runs: dict[str, Any] = {}
    launches = {}
    for kernels in IMPLEMENTATIONS:
        space = ActionSpace(axes(kernels, SHAPE[name].page_size))
        model = dataclasses.replace(MODELS[name], kernels=kernels)
        setup = Setup(
            EpisodeRules(model, space, EpisodeConfig(prefix_len, HORIZON)),
            PolicySpec(model.hidden_size, space.num_actions, HORIZON),
            GrpoConfig(num_schedules=K),
            memory=MemoryConfig(prefill_batch=batch),
        )
        tokens = jax.random.randint(
            jax.random.key(1), (batch, setup.episode.block_length), 0, model.vocab_size
        )
        state = init_state(jax.random.key(2), setup)
        # Not donated: the state is used again.
        step = jax.jit(functools.partial(train_step, setup=setup))
        whole = step.lower(state, weights, tokens).compile()
        launches[kernels] = timing.count_launches(str(whole.as_text()))
        runs[kernels] = functools.partial(whole, state, weights, tokens)
        if kernels == "xla":
            shared, repeated = rollouts(setup, weights, state, tokens)
            runs |= {"rollout": shared, "rollout, repeated caches": repeated}
    rounds = max(rounds, 3)
    seconds = timing.walls(runs, rounds)
    repeating = seconds["xla"] - seconds["rollout"] + seconds["rollout, repeated caches"]
    operations = sum(flops.update_flops(setup, batch).values())
    dense = costs.dense_step(prefix_len + HORIZON // 2, setup.model)
    weight_bytes = sum(part.bytes for part in (dense.attention, dense.gate_up, dense.down))
    once = KernelWork((HORIZON + 1) * weight_bytes + HORIZON * batch * dense.cache.bytes, operations)
    each = KernelWork(once.bytes + HORIZON * batch * (K - 1) * dense.cache.bytes, operations)
    replaced = "the whole update, its rollout's time replaced by that with repeated caches"
    rows = [
        row("update", shape, "sampled", kernels, seconds[kernels], once, launches=launches[kernels])
        for kernels in IMPLEMENTATIONS
    ]
    rows.append(
        row("update", shape, "sampled", "xla, repeated caches", repeating, each, peer=1, note=replaced)
    )
    # The schedules of a sequence want nearly every page between them.
    return [found | {"rounds": rounds, "kept": 1.0} for found in rows]


def rollouts(setup: Setup, weights: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any]:
    """An update's rollout with one prefix for all schedules, and with the prefix repeated for each."""
    K, batch = setup.grpo.num_schedules, len(tokens)
    prefill = jax.jit(lambda w, t: prefill_blocks(w, t, setup))
    episode_B = prefill(weights, tokens)

    def run(weights: Any, episode: Any, params: Any, shape: tuple[int, ...]) -> Any:
        controller = policy_controller(setup.network, params, setup.grpo.temperature)
        memory = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape, *leaf.shape)), controller.memory)
        budget = jnp.ones((*shape, len(setup.space.axes)))
        each = Controller(controller.act, memory)
        return run_schedules(weights, episode, jax.random.key(3), budget, each, setup)

    jitted = jax.jit(run, static_argnums=3)
    repeated_BK = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.repeat(leaf, K, 0), tree))(episode_B)
    return (
        lambda: jitted(weights, episode_B, state.params, (batch, 1, K)),
        lambda: jitted(weights, repeated_BK, state.params, (batch * K, 1, 1)),
    )
