"""How fast schedules are scored, beside updates: what an evaluation's grid costs.

    python -m experiments.benchmarks.evaluate                  # SmolLM2-135M, B=8, T=16, S=1024, bfloat16
    python -m experiments.benchmarks.evaluate --prefix_len 256 --batch_size 4

Random weights of the shape of SmolLM2-135M, one process. A batch of blocks is prefilled once and many
entries (schedules of every episode) are scored on it, as `sol_jax.evaluate` does. Its share of the rate of a
large matrix product, which an update has too, is what the two are compared by; the closing line says how
long a whole grid takes at that rate: 50 requested budgets with the policy and the fixed schedule, 500 random
schedules at 6 of them.
"""

import argparse
import functools
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.timing import shown, timed
from experiments.benchmarks.update import SIZES, make_setup
from sol_jax.costs import update as flops
from sol_jax.evaluation.scoring import BatchScorer, ControllerSpec
from sol_jax.models import llama
from sol_jax.rl.train_step import init_state, train_step
from sol_jax.training.estimate import evaluation_flops

GRID_ENTRIES = 50 * 2 + 500 * 6 + 1  # and dense
GRID_BLOCKS = 50


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of an update and one of `args.entries` entries, with their shares of the matmul rate."""
    setup = make_setup(args, "bfloat16", 1)
    make = jax.jit(functools.partial(llama.init_weights, cfg=setup.model))
    weights = jax.block_until_ready(make(jax.random.key(0)))
    shape = (args.batch_size, setup.episode.block_length)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, setup.model.vocab_size)
    state = init_state(jax.random.key(2), setup)
    run = jax.jit(train_step, static_argnames="setup")
    _, update_seconds, _ = timed(lambda: run(state, weights, tokens, setup=setup), repeats=args.repeats)

    rng = np.random.default_rng(0)
    action = rng.integers(setup.space.num_actions, size=(args.batch_size, 1, args.entries, args.horizon))

    def score() -> Any:
        scorer = BatchScorer(weights, None, np.asarray(tokens), setup, args.batch_size, args.parallel)
        return scorer.play(action.astype(np.int32), ControllerSpec())

    _, score_seconds, _ = timed(score, repeats=args.repeats)
    rate = flops.matmul_rate("bfloat16")
    work = {
        "update": (update_seconds, sum(flops.update_flops(setup, args.batch_size).values())),
        "evaluation": (score_seconds, evaluation_flops(setup, args.batch_size, args.entries)),
    }
    return [
        {
            "what": what,
            "seconds": round(seconds, 3),
            "gflop": round(operations / 1e9, 1),
            "matmul_gflops": round(rate / 1e9, 1),
            "share_of_matmul_rate": round(operations / seconds / rate, 3),
        }
        for what, (seconds, operations) in work.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--entries", type=int, default=64, help="schedules of every episode")
    parser.add_argument("--parallel", type=int, default=32, help="of them at a time")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs; the best counts")
    args = parser.parse_args()
    rows = [shown(row) for row in measure(args)]
    shares = {row["what"]: row["share_of_matmul_rate"] for row in rows}
    setup = make_setup(args, "bfloat16", 1)
    # A batch of the grid prefills once for all its entries.
    whole = evaluation_flops(setup, GRID_BLOCKS, GRID_ENTRIES)
    hours = whole / (shares["evaluation"] * rows[0]["matmul_gflops"] * 1e9) / 3600
    ratio = shares["evaluation"] / shares["update"]
    grid = f"{GRID_ENTRIES} entries, {GRID_BLOCKS} blocks"
    print(f"evaluation / update: {ratio:.2f}; a grid of {grid}: {hours:.1f} h")


if __name__ == "__main__":
    main()
