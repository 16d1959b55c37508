"""The CPU's kernels one by one: seconds of 30 layers, and how they compare with XLA and with doing all.

    python -m experiments.benchmarks.native                       # to experiments/results/native_cpu.csv
    python -m experiments.benchmarks.native --dtypes bfloat16 --context 2048 --rounds 50

Operations of a decode step at the size of SmolLM2-135M, batch 1, random weights, and the refresh of 16
tokens; each case runs the operation in all layers, so that nothing stays in caches.  Cases take turns, and
each ratio is the median over rounds of two that were timed in the same round:

    over_xla        against XLA's form of the same case
    over_whole      against the same kernel that reads all channels or keys
    of_read_rate    bytes a second, as a share of what the sum of a large array reaches
"""

import argparse
import csv
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks.kernel_steps import SMOLLM2, random_weights
from pallas_kernels import attention, gated_mlp, linear, prune, quantize, quest
from sol_jax.models import llama

L, D, F = SMOLLM2.num_layers, SMOLLM2.hidden_size, SMOLLM2.ffn_size
H, G, SIZE = SMOLLM2.num_kv_heads, SMOLLM2.group_size, SMOLLM2.head_size
PAGE, STEPS = 8, 16
KEEPS = (1.0, 0.6, 0.4, 0.2, 0.1)
OF_GROUP = "attention, pages of a group"  # as with `axes.kappa.heads=group`
READ = "read"

Layer = Callable[[jax.Array, jax.Array, Any], jax.Array]


def cases(name: str, dtype: str, context: int) -> tuple[dict[tuple[str, float], Layer], dict[str, Any]]:
    """What each case does in a layer [D] -> [D], by operation and share kept, and the arrays they read."""
    weights = random_weights(dataclasses.replace(SMOLLM2, dtype=dtype))
    layers = weights["layers"]
    cache = llama.KVCache(
        *(jax.random.normal(jax.random.key(n), (L, H, context, SIZE)).astype(dtype) for n in range(2))
    )
    every = jnp.ones(context, bool)
    bounds = jax.vmap(lambda k: quest.page_bounds(k, every, PAGE))(cache.k)
    arrays = {
        "gain": layers["mlp_norm"][0],
        "cache": cache,
        "bounds": bounds,
        **{key: layers[key] for key in ("q", "k", "v", "o", "gate", "up", "down")},
    }
    pages = context // PAGE
    used = jnp.ones(pages, bool), jnp.ones(3, bool)
    own = jnp.zeros((H, STEPS, SIZE), dtype)

    def first(x: jax.Array) -> jax.Array:
        return jnp.resize(x.reshape(-1), (D,))

    def heads(x: jax.Array) -> jax.Array:
        return x.reshape(H, G, SIZE).astype(dtype)

    def projections(x: jax.Array, i: jax.Array, a: Any) -> jax.Array:
        q, k, v = linear.project(x, [a["q"], a["k"], a["v"]], name, i)
        x = linear.project(q + jnp.sum(k) + jnp.sum(v), [a["o"]], name, i)[0]
        return linear.project(jnp.resize(x, (F,)), [a["down"]], name, i)[0]

    def gated(x: jax.Array, i: jax.Array, a: Any, keep: float) -> jax.Array:
        kept = jnp.arange(D) * 385 % D < keep * D  # 385 has no factor of 576
        return first(gated_mlp.gated_hidden(jnp.where(kept, x, 0.0), a["gate"], a["up"], name, i))

    def attended(x: jax.Array, i: jax.Array, a: Any, keep: float, alike: bool = False) -> jax.Array:
        # Heads of a group choose pages of their own, half of them the same, or all if they are alike.
        place = jnp.arange(pages) * 7 % pages
        shift = jnp.arange(G)[:, None] * (0 if alike else keep * pages / 2)
        chosen = jnp.broadcast_to((place - shift) % pages < keep * pages, (H, G, pages))
        mixed = attention.attend(
            heads(x), a["cache"], (own, own), chosen, jnp.ones((1, 1, STEPS), bool),
            jnp.int32(context), PAGE, layer=i, implementation=name,
        )  # fmt: skip
        return first(mixed)

    def selected(x: jax.Array, i: jax.Array, a: Any) -> jax.Array:
        parts = a["bounds"], jnp.zeros((H, 3, 2 * SIZE), dtype)
        masks = quest.select_pages(
            heads(x), parts, used, jnp.int32(max(pages // 10, 1)), layer=i, implementation=name
        )
        return jnp.zeros(D) + sum(jnp.sum(mask) for mask in masks)

    def pruned(x: jax.Array, i: jax.Array, a: Any) -> jax.Array:
        return prune.norm_prune(x, a["gain"], 1e-5, jnp.float32(0.4), name).x_D

    def rounded(x: jax.Array, i: jax.Array, a: Any) -> jax.Array:
        return quantize.quantize_residual(x, jnp.int32(6), x, a["gain"], 1e-5, name)[1]

    found: dict[tuple[str, float], Layer] = {("q, k, v, o, down", 1.0): projections}
    for keep in KEEPS:
        found["gate, up", keep] = functools.partial(gated, keep=keep)
        found["attention", keep] = functools.partial(attended, keep=keep)
    found[OF_GROUP, 0.1] = functools.partial(attended, keep=0.1, alike=True)
    found |= {("choice of pages", 0.1): selected, ("norm, prune", 0.4): pruned, ("round, norm", 1.0): rounded}
    return found, {**arrays, "embed": weights["embed"]}


def bytes_of(op: str, keep: float, context: int, width: int) -> float:
    """What a case reads of weights and caches; a group's heads read the union of their pages."""
    union = min(1.0, keep * (1 + (G - 1) / 2))
    parts = {
        "q, k, v, o, down": D * (H * G + 2 * H) * SIZE + H * G * SIZE * D + F * D,
        "gate, up": 2 * D * F * keep,
        "attention": 2 * H * context * SIZE * union,
        OF_GROUP: 2 * H * context * SIZE * keep,
        "choice of pages": H * context / PAGE * 2 * SIZE,
        "head": SMOLLM2.vocab_size * D / L,
    }
    refreshed = ("q, k, v, o, down", "gate, up", "attention")
    parts["refresh"] = sum(parts[name] for name in refreshed)  # once for all of its tokens
    return L * width * parts.get(op, 0.0)


def measure(dtype: str, context: int, rounds: int) -> list[dict[str, Any]]:
    runs: dict[tuple[str, float, str], Callable[[], Any]] = {}
    x_D, tokens_N = jax.random.normal(jax.random.key(1), (D,)), jnp.arange(STEPS)
    shape = dataclasses.replace(SMOLLM2, dtype=dtype)
    weights = random_weights(shape)
    for name in ("native", "xla"):
        found, arrays = cases(name, dtype, context)
        for key, layer in found.items():

            def whole(x: jax.Array, arrays: Any, layer: Layer = layer) -> jax.Array:
                # A little of each result goes on: no layer can be left out, and nothing grows or fades to 0.
                return lax.scan(lambda x, i: (x + 1e-3 * layer(x, i, arrays), None), x, jnp.arange(L))[0]

            runs[*key, name] = functools.partial(jax.jit(whole), x_D, arrays)
        head = jax.jit(functools.partial(linear.match, implementation=name))
        runs["head", 1.0, name] = functools.partial(head, x_D, arrays["embed"])
        refresh = jax.jit(functools.partial(llama.extend, cfg=dataclasses.replace(shape, kernels=name)))
        given = weights, tokens_N, arrays["cache"], jnp.int32(context)
        runs["refresh", 1.0, name] = functools.partial(refresh, *given)
    large = jnp.ones(1 << 27, jnp.float32)
    runs[READ, 1.0, "xla"] = functools.partial(jax.jit(jnp.sum), large)
    seconds: dict[Any, list[float]] = {case: [] for case in runs}
    for _ in range(rounds + 1):  # the first compiles
        for case, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[case].append(time.perf_counter() - start)
    taken = {case: np.array(values[1:]) for case, values in seconds.items()}
    read_rate = large.nbytes / taken[READ, 1.0, "xla"]
    rows = []
    for (op, keep, name), times in taken.items():
        size = large.nbytes if op == READ else bytes_of(op, keep, context, jnp.dtype(dtype).itemsize)
        row = {"dtype": dtype, "context": context, "op": op, "keep": keep, "implementation": name}
        row |= {"milliseconds": 1e3 * float(np.median(times)), "fastest": 1e3 * float(times.min())}
        if (op, keep, "xla") in taken:
            row["over_xla"] = float(np.median(taken[op, keep, "xla"] / times))
        dense = taken.get(("attention" if op == OF_GROUP else op, 1.0, name))
        if dense is not None and keep < 1:
            row["over_whole"] = float(np.median(dense / times))
            row["over_whole_fastest"] = float(dense.min() / times.min())
        if size:
            row |= {"gb_per_second": size / float(np.median(times)) / 1e9}
            row["of_read_rate"] = float(np.median(size / times / read_rate))
            row["of_read_rate_fastest"] = float(size / times.min() / read_rate.max())
        rows.append({key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in row.items()})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--csv", type=pathlib.Path, default=pathlib.Path("experiments/results/native_cpu.csv")
    )
    args = parser.parse_args(argv)
    rows = [row for dtype in args.dtypes for row in measure(dtype, args.context, args.rounds)]
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
