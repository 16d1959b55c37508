"""How fast a GRPO update runs, and where its time goes, as ratios measured in the same process.

    python -m experiments.benchmarks.update                       # SmolLM2-135M, B=8, K=16, T=16, S=1024
    python -m experiments.benchmarks.update --prefix_len 256 --batch_size 4 --csv FILE
    python -m experiments.benchmarks.update --scaling --batch_size 2     # cost against K and against T
    python -m experiments.benchmarks.update --config configs/sol_j_fl.py # with the axes of a config

The axes have three levels each unless a config is given, of which nothing else is taken.  Weights are
random and of the shape of SmolLM2-135M: speed does not depend on their values.  Each mode (float32,
bfloat16, and bfloat16 with several episodes per prefix) runs in turn, in a process of its own: a process
keeps memory that it has freed, so a later mode would seem to need less.  The rate of a large matrix product
of the same operands is measured in the same process, since absolute times differ from run to run.  Stages
are timed by jitting them alone, so they need not add up to the whole.  `policy_seconds` is the part of
`rollout_seconds` in which actions are chosen: what the same rollout takes less without a policy.

`loop_rate` compares the training loop, whose programs are those of one row of a mesh, with the whole update
in one program: its speed as a share of that one's, the median of alternated rounds.
"""

import argparse
import csv
import ctypes
import dataclasses
import functools
import multiprocessing
import pathlib
import statistics
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.kernel_steps import SMOLLM2
from experiments.benchmarks.timing import shown, timed
from sol_jax.axes.base import ActionSpace
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.costs import update as flops
from sol_jax.errors import exits_on_user_error
from sol_jax.files import path_argument
from sol_jax.models import llama
from sol_jax.models.sharding import make_mesh, weight_shardings
from sol_jax.rl import collect, learn
from sol_jax.rl.config import EpisodeConfig, GrpoConfig
from sol_jax.rl.policy import PolicySpec
from sol_jax.rl.rollout import Controller, EpisodeRules, PrefilledBlock, policy_controller, replay
from sol_jax.rl.setup import Setup
from sol_jax.rl.sharded_update import sharded_update
from sol_jax.rl.train_step import init_state, train_step
from sol_jax.training.from_config import load_config

SIZES = {"batch_size": 8, "num_schedules": 16, "horizon": 16, "prefix_len": 1024}
SPACE = ActionSpace(
    (
        Quest((0.1, 0.5, 1.0), (0.1, 1.0), 100.0),
        ChannelPruning((0.4, 0.7, 1.0), (0.4, 1.0), 100.0),
        OutputQuantization((5, 8, 16), (0.3125, 1.0), 200.0),
    )
)


def resident_gib(peak: bool) -> float:
    """Resident size of this process, now or at its highest since `restart_peak` (Linux)."""
    name = "VmHWM:" if peak else "VmRSS:"
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 2**20


def restart_peak() -> None:
    """From here on; what was freed before no longer counts."""
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def device_kind() -> str:
    return jax.devices()[0].device_kind


def make_setup(args: argparse.Namespace, dtype: str, windows: int, config: str | None = None) -> Setup:
    space = load_config(config).space(SMOLLM2) if config else SPACE
    return Setup(
        EpisodeRules(
            dataclasses.replace(SMOLLM2, dtype=dtype),
            space,
            EpisodeConfig(args.prefix_len, args.horizon, windows),
        ),
        PolicySpec(SMOLLM2.hidden_size, space.num_actions, args.horizon),
        GrpoConfig(num_schedules=args.num_schedules),
    )


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns in a fresh process, which ends with it."""
    spawn = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(function, *args).result()


def measure(args: argparse.Namespace, dtype: str, windows: int) -> dict[str, Any]:
    """One row: a whole update, its share of the matmul rate and, unless `--scaling`, its stages.

    Of the process, which must have done nothing else yet, memory is all beyond what it began with and the
    weights: at its highest with compilation, and while a compiled update runs.
    """
    setup = make_setup(args, dtype, windows, args.config)
    jax.devices()  # the backend's own memory is no update's
    base = resident_gib(peak=False)
    weights = jax.block_until_ready(
        jax.jit(functools.partial(llama.init_weights, cfg=setup.model))(jax.random.key(0))
    )
    base += sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) / 2**30
    restart_peak()
    shape = (args.batch_size, setup.episode.block_length)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, setup.model.vocab_size)
    state = init_state(jax.random.key(2), setup)
    run = jax.jit(train_step, static_argnames="setup")  # not donated: the state is used again
    first, whole, _ = timed(lambda: run(state, weights, tokens, setup=setup), repeats=args.repeats)
    peak = resident_gib(peak=True) - base
    restart_peak()
    jax.block_until_ready(run(state, weights, tokens, setup=setup))
    running_peak = resident_gib(peak=True) - base
    rate = flops.matmul_rate(dtype)
    work = flops.update_flops(setup, args.batch_size)
    decoded = args.batch_size * windows * args.num_schedules * args.horizon
    row = {
        "dtype": dtype,
        "config": args.config or "",
        **{name: getattr(args, name) for name in SIZES},
        "episodes_per_prefix": windows,
        "seconds": round(whole, 3),
        "schedule_tokens_per_second": round(decoded / whole, 1),
        "gflop": round(sum(work.values()) / 1e9, 1),
        "matmul_gflops": round(rate / 1e9, 1),
        "share_of_matmul_rate": round(sum(work.values()) / whole / rate, 3),
        "compile_seconds": round(first - whole, 1),
        "peak_gib_beyond_weights": round(peak, 2),
        "running_peak_gib_beyond_weights": round(running_peak, 2),
        "loop_rate": round(loop_rate(args, setup, weights, tokens, state, run), 3),
    }
    return row if args.scaling else row | stages(args, setup, weights, tokens, state)


def loop_rate(
    args: argparse.Namespace,
    setup: Setup,
    weights: Any,
    tokens: jax.Array,
    state: learn.TrainState,
    run: Callable[..., Any],
) -> float:
    """Seconds of `run`, one program, over those of the same update as the training loop makes it."""
    setup = dataclasses.replace(setup, grpo=dataclasses.replace(setup.grpo, batch_size=args.batch_size))
    mesh, blocks = make_mesh(1, 1, jax.devices()[:1]), np.asarray(tokens)
    on_mesh = jax.device_put(weights, weight_shardings(setup.model, mesh))

    def loop() -> Any:
        given = jax.tree.map(jnp.copy, state)  # it is donated
        return sharded_update(given, on_mesh, blocks.__getitem__, setup, mesh, args.batch_size)

    def seconds(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - start

    def whole() -> Any:
        return run(state, weights, tokens, setup=setup)

    jax.block_until_ready((loop(), whole()))
    rounds = [(seconds(whole), seconds(loop)) for _ in range(args.repeats)]
    return statistics.median(one / parts for one, parts in rounds)


def stages(
    args: argparse.Namespace, setup: Setup, weights: Any, tokens: jax.Array, state: learn.TrainState
) -> dict[str, float]:
    """Seconds of prefill, rollout, the policy's part of it, head and fit, each jitted alone."""
    B, W, K = args.batch_size, setup.episode.episodes_per_prefix, args.num_schedules
    budget = jnp.full((B, W, K, len(setup.space.axes)), 0.6)
    prefill = jax.jit(lambda w, t: collect.prefill_blocks(w, t, setup))
    _, prefill_seconds, blocks = timed(prefill, weights, tokens, repeats=args.repeats)

    def roll(weights: Any, blocks: PrefilledBlock, controller: Controller) -> Any:
        memory = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, W, K, *x.shape)), controller.memory)
        each = controller._replace(memory=memory)
        return collect.run_schedules(weights, blocks, jax.random.key(3), budget, each, setup)

    @jax.jit
    def roll_policy(weights: Any, params: Any, blocks: PrefilledBlock) -> Any:
        return roll(weights, blocks, policy_controller(setup.network, params, setup.grpo.temperature))

    @jax.jit
    def roll_given(weights: Any, action_T: jax.Array, blocks: PrefilledBlock) -> Any:
        return roll(weights, blocks, replay(action_T))

    _, roll_seconds, rollout = timed(roll_policy, weights, state.params, blocks, repeats=args.repeats)
    action_T = rollout.action[0, 0, 0]
    _, given_seconds, _ = timed(roll_given, weights, action_T, blocks, repeats=args.repeats)
    head = jax.jit(lambda w, hidden, label: collect.score_labels(w, hidden, label, setup.memory.head_rows))
    labels = blocks.episodes.label
    _, head_seconds, reward = timed(head, weights, rollout.hidden, labels, repeats=args.repeats)

    @jax.jit
    def fit(state: learn.TrainState, rollout: Any, reward: jax.Array) -> Any:
        adv, _, _ = learn.advantages(reward, rollout, budget[:, :, 0], setup)
        experience = learn.Experience(rollout.observation, rollout.action, rollout.logp, adv)
        experience = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), experience)
        order = learn.minibatches(jax.random.key(4), B * W * K, setup.optim, args.horizon)
        return learn.fit(state, experience, *order, setup)[0]

    _, fit_seconds, _ = timed(fit, state, rollout, reward, repeats=args.repeats)
    named = {
        "prefill": prefill_seconds,
        "rollout": roll_seconds,
        "policy": roll_seconds - given_seconds,
        "head": head_seconds,
        "fit": fit_seconds,
    }
    return {f"{name}_seconds": round(seconds, 3) for name, seconds in named.items()}


def compare_modes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """float32, bfloat16, and bfloat16 with four episodes per prefix."""
    rows = [
        shown(alone(measure, args, dtype, windows))
        for dtype, windows in (("float32", 1), ("bfloat16", 1), ("bfloat16", 4))
    ]
    base, narrow, shared = (row["schedule_tokens_per_second"] for row in rows)
    print(f"bfloat16 / float32: {narrow / base:.2f}x; 4 episodes per prefix: {shared / narrow:.2f}x more")
    return rows


def compare_sizes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """K and T, each halved, as given and doubled: what an update costs beside the smallest."""
    rows = []
    for name in ("num_schedules", "horizon"):
        for size in (getattr(args, name) // 2, getattr(args, name), getattr(args, name) * 2):
            sizes = argparse.Namespace(**vars(args) | {name: size})
            rows.append(shown(alone(measure, sizes, "bfloat16", 1)))
        least, *more = rows[-3:]
        grown = [(row["seconds"] / least["seconds"], row[name] // least[name]) for row in more]
        print(
            f"{name}: " + ", ".join(f"{seconds:.2f}x the time for {n}x" for seconds, n in grown), flush=True
        )
    return rows


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=SIZES["batch_size"])
    parser.add_argument("--num_schedules", type=int, default=SIZES["num_schedules"])
    parser.add_argument("--horizon", type=int, default=SIZES["horizon"])
    parser.add_argument("--prefix_len", type=int, default=SIZES["prefix_len"])
    parser.add_argument("--config", help="whose axes there are, such as configs/sol_j_fl.py")
    parser.add_argument("--scaling", action="store_true", help="vary K and T instead of the mode")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each stage; the best counts")
    parser.add_argument("--csv", type=path_argument, help="file to write the rows to")
    args = parser.parse_args()
    if args.config:
        load_config(args.config)  # a mistake in it is told before anything is measured
    # Asked elsewhere: a process that has seen a GPU keeps most of its memory.
    print(f"jax {jax.__version__} on {alone(device_kind)}: {vars(args)}", flush=True)
    rows = compare_sizes(args) if args.scaling else compare_modes(args)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
