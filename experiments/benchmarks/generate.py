"""How fast text is generated, beside what this machine's arithmetic and memory allow, and what a policy adds.

    python -m experiments.benchmarks.generate                  # SmolLM2-135M, batch 1 to 32, prompts to 2,000
    python -m experiments.benchmarks.generate --batch_sizes 8 --prompts 256 --first_batches --rounds 30 \\
        --csv FILE
    python -m experiments.benchmarks.generate --smoke          # a tiny model

Random weights of the shape of SmolLM2-135M and caches of random entries, as long as the engine makes them:
speed does not depend on values.  A timed run is one episode, 16 tokens of every text; what is compared takes
turns in one process, in an order that rotates, and times are medians.

The table gives two limits of dense generation, from what `sol_jax.costs.decode_step` counts and from rates
measured beside it: the rate of a large matrix product for a token's operations, and the rate of a large copy
for its bytes (weights once per step for the whole batch, each text's own cache).  A copy also writes, which
costs some processors another read, so a program that only reads may come out above the second.  The rows
below are relative to dense generation:

    policy    a policy chooses among all levels of SOL-J-FL, and each choice is replaced by the dense action
    masks     the same, with that action's masks and rounding computed like any other's
    refresh   no policy, but the dense pass that replaces an episode's cache entries

The last rows are first tokens: a prompt through the engine, once with compilation, then others of its
bucket.
"""

import argparse
import csv
import dataclasses
import functools
import itertools
import logging
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import kernel_steps, timing
from experiments.benchmarks.kernel_steps import SMOLLM2
from experiments.benchmarks.timing import shown, timed
from pallas_kernels.dispatch import current_platform
from sol_jax.axes.base import ActionSpace, Axis, held_full
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.costs import update as flops
from sol_jax.files import path_argument
from sol_jax.generation import episodes as decoding
from sol_jax.generation.episodes import Decoder, Played, TextState
from sol_jax.models.llama import KVCache, LlamaConfig, Weights, index_cache
from sol_jax.rl.config import EpisodeConfig
from sol_jax.rl.policy import Observation, Policy, PolicySpec, example_observation, initial_carry
from sol_jax.rl.rollout import Controller, EpisodeRules

Rows = list[dict[str, Any]]

HORIZON = 16
MAX_TOKENS = 128  # that texts have room for, as `sol_jax.generate` has it
# The most important first, for when time runs out; of the first batch size also `masks` and `refresh`.
SIZES = {"batch_sizes": (8, 1, 32), "prompts": (256, 1, 2000), "first_batches": (1, 8)}
SMOKE_SIZES = {"batch_sizes": (8, 1), "prompts": (40, 1), "first_batches": (2,)}
SPACE = ActionSpace(
    (
        Quest(tuple(k / 10 for k in range(1, 11)), (0.1, 1.0), 100.0),
        ChannelPruning(tuple(r / 100 for r in range(40, 101, 5)), (0.4, 1.0), 100.0),
        OutputQuantization(tuple(range(5, 17)), (0.3125, 1.0), 200.0),
    )
)
TARGET_BATCH = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """What all cases share."""

    model: LlamaConfig
    weights: Weights
    params: Any  # of the policy
    rounds: int
    smoke: bool = False

    @functools.cached_property
    def decoders(self) -> dict[str, Decoder]:
        """Who generates: see above."""
        batch = decoding.usual_prefill_batch()
        space = ActionSpace(held_full(SPACE.axes))
        rules = EpisodeRules(self.model, space, EpisodeConfig(horizon=HORIZON))
        dense = Decoder(rules, refresh=False, prefill_batch=batch)
        policy = dataclasses.replace(dense, policy=policy_spec(self.model))
        return {
            "dense": dense,
            "policy": policy,
            "masks": policy.with_rules(space=SPACE),
            "refresh": dataclasses.replace(dense, refresh=True),
        }


def policy_spec(model: LlamaConfig) -> PolicySpec:
    return PolicySpec(model.hidden_size, SPACE.num_actions, HORIZON)


def make_bench(model: LlamaConfig, rounds: int, smoke: bool) -> Bench:
    cfg = policy_spec(model)
    init = jax.jit(functools.partial(Policy(cfg).init, method="step"))
    params = init(jax.random.key(1), example_observation(cfg), initial_carry(cfg))
    return Bench(model, kernel_steps.random_weights(model), params, rounds, smoke)


# --- episodes ----------------------------------------------------------------------------------------


def translated(policy: Controller, num_actions: int, taken_A: jax.Array) -> Controller:
    """`policy` with a space of actions of its own: where it chooses `a`, the model takes `taken_A[a]`.

    It is told of its own choices, as ever.  `taken_A` must be traced: of a constant XLA might see that the
    choice does not matter, and leave out the policy.
    """

    def act(key: jax.Array, seen: Observation, memory: Any) -> tuple[jax.Array, jax.Array, Any]:
        own, previous = memory
        action, logp, own = policy.act(key, seen._replace(prev_action=previous), own)
        return taken_A[action], logp, (own, action)

    return Controller(act, (policy.memory, jnp.int32(num_actions)))


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="text_B")
def play_translated(
    weights: Weights, params: Any, text_B: TextState, budget_BxX: jax.Array, taken_A: jax.Array, cfg: Decoder
) -> tuple[TextState, Played]:
    """`decoding.play` under a `translated` policy, so that the decoder's space need not be the policy's."""

    def one(text: TextState, budget_X: jax.Array) -> tuple[TextState, Played]:
        assert cfg.policy is not None
        greedy = decoding.controller_of(cfg, params, jnp.zeros(HORIZON, jnp.int32))
        controller = translated(greedy, cfg.policy.num_actions, taken_A)
        steps, suffix, hidden_D = decoding.draft(weights, text, budget_X, controller, cfg)
        return decoding.keep_all(weights, text, steps, suffix, hidden_D, cfg)

    return jax.vmap(one)(text_B, budget_BxX)


def room(prompt: int) -> int:
    """Entries of the engine's cache for a text with such a prompt."""
    return _bucket(_bucket(prompt, 4) + MAX_TOKENS + HORIZON, 8)


def _bucket(length: int, parts: int) -> int:
    """`engine.length_bucket`, whose module takes packages that a machine for `make gpu-check` may lack."""
    step = max((1 << (length - 1).bit_length()) // (2 * parts), 32)
    return -(-length // step) * step


@functools.partial(jax.jit, static_argnames=("batch", "prompt", "cfg", "axes"))
def random_texts(batch: int, prompt: int, cfg: LlamaConfig, axes: tuple[Axis, ...] = ()) -> TextState:
    """Texts as after the prefill of one prompt for all, of random numbers, with what `axes` keep of them."""
    size = (cfg.num_layers, cfg.num_kv_heads, room(prompt), cfg.head_size)
    k, v = (jax.random.normal(key, size, cfg.dtype) for key in jax.random.split(jax.random.key(2)))
    hidden_D = jax.random.normal(jax.random.key(3), (cfg.hidden_size,))
    cache, index = index_cache(KVCache(k, v), axes)
    one = TextState(cache, index, jnp.int32(prompt), hidden_D, jnp.int32(1), jax.random.key(4))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), one)


def episodes(bench: Bench, batch: int, prompt: int, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Functions that play one episode after the prompt, by who generates; they share the texts' caches."""
    text_B = random_texts(batch, prompt, bench.model)
    length_B, budget_BxX = np.full(batch, prompt, np.int32), jnp.ones((batch, len(SPACE.axes)))

    def prepared(cfg: Decoder) -> Callable[[], Any]:
        axes, dense = cfg.space.axes, jnp.int32(cfg.space.dense)
        index_B = jax.vmap(lambda cache: index_cache(cache, axes).axis_index)(text_B.cache)
        if cfg.policy is None:
            play: Any = functools.partial(decoding.play, plan_BxT=jnp.tile(dense, (batch, HORIZON)))
        else:
            play = functools.partial(play_translated, taken_A=jnp.tile(dense, cfg.policy.num_actions))
        params = bench.params if cfg.policy else None

        def run() -> Any:
            nonlocal text_B, index_B
            # The entries that the last run added are overwritten.
            again_B = text_B._replace(length=length_B, axis_index=index_B)
            text_B, played = play(bench.weights, params, again_B, budget_BxX, cfg=cfg)
            index_B = text_B.axis_index
            return text_B, played

        return run

    return {name: prepared(bench.decoders[name]) for name in names}


# --- rates and limits --------------------------------------------------------------------------------


def measure_rates(dtype: str, smoke: bool) -> timing.DeviceRates:
    """What the device reaches, measured now; on a GPU once, in bfloat16, in chains that hide the dispatch."""
    if current_platform() == "gpu":
        return _gpu_rates(smoke)
    numbers, size = (1 << 16, 128) if smoke else (1 << 26, 2048)
    scale = jax.jit(lambda x, factor: x * factor)
    _, seconds, _ = timed(scale, jnp.ones(numbers), jnp.float32(1.5), repeats=5)
    return timing.DeviceRates(2 * 4 * numbers / seconds, flops.matmul_rate(dtype, size))


@functools.cache
def _gpu_rates(smoke: bool) -> timing.DeviceRates:
    return timing.measure_rates(smoke, rounds=10)


def limits(batch: int, prompt: int, model: LlamaConfig, rates: timing.DeviceRates) -> dict[str, float]:
    """What a token of a dense episode takes, and how many a second the two rates allow."""
    steps = [kernel_steps.step_work((), batch, prompt + 1 + t, model, ()) for t in range(HORIZON)]
    operations = sum(step.flops for step in steps) / (batch * HORIZON)
    read = sum(step.bytes for step in steps) / (batch * HORIZON)
    return {
        "gflop_per_token": operations / 1e9,
        "mb_per_token": read / 1e6,
        "matmul_gflops": rates.matmul / 1e9,
        "copy_gb_per_second": rates.copy / 1e9,
        "matmul_limit": rates.matmul / operations,
        "bandwidth_limit": rates.copy / read,
    }


# --- rows --------------------------------------------------------------------------------------------


def generation(bench: Bench, batch: int, prompt: int, names: Sequence[str]) -> Rows:
    """A row of each of `names`: of "dense" with its limits, of others with what they take beyond it."""
    runs = episodes(bench, batch, prompt, list(dict.fromkeys(("dense", *names))))
    seconds = timing.walls(runs, bench.rounds)
    rows = []
    for name in names:
        row: dict[str, Any] = {
            "what": name,
            "dtype": bench.model.dtype,
            "batch_size": batch,
            "prompt": prompt,
        }
        row |= {"seconds": seconds[name], "tokens_per_second": batch * HORIZON / seconds[name]}
        if name == "dense":
            row |= limits(batch, prompt, bench.model, measure_rates(bench.model.dtype, bench.smoke))
            found = {
                kind: row["tokens_per_second"] / row[f"{kind}_limit"] for kind in ("matmul", "bandwidth")
            }
            row |= {f"share_of_{kind}_limit": share for kind, share in found.items()}
            row["share_of_lower_limit"] = max(found.values())
        else:
            row["overhead"] = seconds[name] / seconds["dense"] - 1
        rows.append(row)
    return rows


def first_tokens(bench: Bench, batch: int, prompt: int) -> Rows:
    """Seconds from prompts to their first tokens, with compilation and without, through the engine.

    The second prompts are the shortest of the bucket, and must compile nothing.
    """
    # Not above: a machine for `make gpu-check` need not have what these take.
    import tokenizers

    from sol_jax.generation.engine import Engine, Request, length_bucket, stream
    from sol_jax.models.tokenizer import Tokenizer

    silent = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()), eos_id=-1)  # texts have no characters
    engine, compiled = Engine(bench.weights, silent, bench.decoders["dense"]), decoding.start
    before, seconds = _programs(compiled), []
    shortest = next(n for n in range(1, prompt + 1) if length_bucket(n) == length_bucket(prompt))
    for length in (prompt, shortest, prompt):
        ids = np.random.default_rng(length).integers(bench.model.vocab_size, size=length).tolist()
        start = time.perf_counter()
        next(stream(engine, [Request(ids, max_tokens=MAX_TOKENS)] * batch))
        seconds.append(time.perf_counter() - start)
    row: dict[str, Any] = {"what": "first token", "dtype": bench.model.dtype}
    row |= {"batch_size": batch, "prompt": prompt, "seconds": min(seconds[1:])}
    buckets = {(batch_size, length) for _, batch_size, length, _ in engine.compiled}
    row |= {"first_seconds": seconds[0], "buckets": len(buckets)}
    return [row | {"compiled": _programs(compiled) - before}]


def _programs(function: Any) -> int:
    """How many programs a jitted function has been compiled to."""
    return function._cache_size()


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in row.items()}


# --- targets -----------------------------------------------------------------------------------------


def verdicts(rows: Rows, most_overhead: float) -> list[str]:
    """A line per target that was measured: the worst case, and whether it is good enough."""
    kinds = {
        "policy": lambda found: _overhead(found, most_overhead),
        "dense": _throughput,
        "first token": _first_token,
    }
    of_kind = {kind: [row for row in rows if row["what"] == kind] for kind in kinds}
    of_kind["dense"] = [row for row in of_kind["dense"] if row["batch_size"] == TARGET_BATCH]
    return [say(of_kind[kind]) for kind, say in kinds.items() if of_kind[kind]]


def _overhead(rows: Rows, most: float) -> str:
    worst = max(rows, key=lambda row: row["overhead"])
    return (
        f"policy overhead: at most {worst['overhead']:+.1%} ({_place(worst)}); "
        f"the target is at most {most:.0%}: {_verdict(worst['overhead'] <= most)}"
    )


def _throughput(rows: Rows) -> str:
    def reached(row: dict[str, Any]) -> float:
        return row["tokens_per_second"] / min(0.5 * row["matmul_limit"], 0.9 * row["bandwidth_limit"])

    worst = min(rows, key=reached)
    return (
        f"throughput: {worst['tokens_per_second']:.4g} tokens/s ({_place(worst)}) are "
        f"{worst['share_of_matmul_limit']:.0%} of the matmul limit and "
        f"{worst['share_of_bandwidth_limit']:.0%} of the bandwidth limit; "
        f"the target is the lower of 50% of one and 90% of the other: {_verdict(reached(worst) >= 1)}"
    )


def _first_token(rows: Rows) -> str:
    most = max(row["compiled"] / row["buckets"] for row in rows)
    slowest = max(rows, key=lambda row: row["seconds"])
    compiling = max(row["first_seconds"] - row["seconds"] for row in rows)
    return (
        f"first token: at most {slowest['seconds']:.2f} s warm ({_place(slowest)}), {compiling:.1f} s more "
        f"with compilation; {most:g} programs a bucket, the target is at most one: {_verdict(most <= 1)}"
    )


def _verdict(good: bool) -> str:
    return "met" if good else "MISSED"


def _place(row: dict[str, Any]) -> str:
    return f"batch {row['batch_size']}, prompt {row['prompt']}"


# --- the program -------------------------------------------------------------------------------------


def jobs(args: argparse.Namespace, bench: Bench) -> list[tuple[str, Callable[[], Rows]]]:
    """What is measured, in order."""
    found: list[tuple[str, Callable[[], Rows]]] = []
    for batch in args.batch_sizes:
        compared = [("dense", "policy"), *[("masks", "refresh")] * (batch == args.batch_sizes[0])]
        for prompt, names in itertools.product(args.prompts, compared):
            run = functools.partial(generation, bench, batch, prompt, names)
            found.append((f"{' and '.join(names)}, batch {batch}, prompt {prompt}", run))
    for batch in args.first_batches:
        for prompt in args.prompts:
            run = functools.partial(first_tokens, bench, batch, prompt)
            found.append((f"first token, batch {batch}, prompt {prompt}", run))
    return found


def measure(args: argparse.Namespace, bench: Bench, deadline: float) -> Rows:
    """The rows of all jobs that there is time for, printed and written as they come."""
    rows: Rows = []
    for label, run in jobs(args, bench):
        if time.monotonic() > deadline:
            print(f"left out, no time: {label}", flush=True)
            continue
        rows += [shown(rounded(row)) for row in run()]
        if args.csv:
            write(args.csv, rows)
    return rows


def write(path: pathlib.Path, rows: Rows) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, nargs="*", help=f"default: {' '.join(map(str, default))}")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: float32; bfloat16 on a GPU"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed episodes of each; the median counts")
    parser.add_argument("--minutes", type=float, default=60.0, help="what is not begun by then is left out")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, small rates; for tests")
    parser.add_argument("--csv", type=path_argument, help="file to write the rows to")
    args = parser.parse_args(given)
    for name, default in (SMOKE_SIZES if args.smoke else SIZES).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    gpu = current_platform() == "gpu"
    args.dtype = args.dtype or ("bfloat16" if gpu else "float32")
    if gpu and args.dtype != "bfloat16":
        parser.error("the rates of a GPU are measured in bfloat16; leave out --dtype")
    return args


def main(given: Sequence[str] | None = None) -> None:
    args = parse(given)
    deadline = time.monotonic() + 60 * args.minutes
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}: {vars(args)}", flush=True)
    logging.getLogger("absl").setLevel(logging.INFO)  # the engine says which buckets it compiles
    model = kernel_steps.MODELS["tiny"] if args.smoke else SMOLLM2
    model = dataclasses.replace(model, dtype=args.dtype)
    rows = measure(args, make_bench(model, args.rounds, args.smoke), deadline)
    for line in verdicts(rows, 0.03 if current_platform() == "gpu" else 0.05):
        print(line)


if __name__ == "__main__":
    main()
