"""What a step costs in time on this machine: prices for budgets in seconds.  `make prices`.

    python -m experiments.benchmarks.prices --dtype bfloat16 --output runs/prices.json
    python -m sol_jax.train --config configs/counterfactual.py:cpu,quest --config.policy.one_budget=time \\
        --config.axes.prices=runs/prices.json --workdir runs/timed

Decode steps are timed as `experiments.benchmarks.clock` does, without refreshes: dense, and at actions of one
axis and of several, after contexts of several lengths.  What each reads and computes is counted by
`sol_jax.costs.decode_step`, and the prices of a byte, of an operation and of a layer's launches are fitted to
the times by least squares of relative errors, with no negative price (`pallas_kernels.cost_model`).  The
last lines say how far the fit is off, also where a context was left out of it.

Each time is that of the dense step, the fastest of all, times the median ratio of two episodes that were
played beside each other.  Prices are of a type of numbers and of the kernels in use, and of batch 1.  On a
GPU or TPU `experiments.benchmarks.roofline` fits them to the table of kernels instead.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from experiments.benchmarks import clock
from pallas_kernels import cost_model
from pallas_kernels.cost_model import CostModel
from sol_jax.costs.decode_step import step_cost
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.files import path_argument
from sol_jax.models.llama import LlamaConfig
from sol_jax.models.model import Model, open_model
from sol_jax.models.weights import EMBEDDED

ACTIONS = (
    (1.0, 1.0, 16.0),
    (0.1, 1.0, 16.0),
    (0.4, 1.0, 16.0),
    (1.0, 0.4, 16.0),
    (1.0, 0.7, 16.0),
    (1.0, 1.0, 8.0),
    (0.2, 0.7, 8.0),
)


class Timing(NamedTuple):
    """Decode steps at one action."""

    context: int
    action: tuple[float, ...]  # kappa, rho and bits
    bytes: float
    flops: float
    seconds: float


def step_timings(model: Model, contexts: Sequence[int], episodes: int, rule: str) -> list[Timing]:
    """The mean step of an episode, at each action after each context."""
    asked = argparse.Namespace(
        kernels="auto", rule=rule, fixed=ACTIONS, refreshes=["never"], policies=[], budgets=[]
    )
    found = []
    for context in contexts:
        dense, _, *fixed = clock.players(model, asked)
        timed = clock.side_by_side(model, [dense, *fixed], context, texts=1, episodes=episodes)
        # The least disturbed of all: other work on the machine makes contexts differ for no reason of theirs.
        base = float(np.min(np.concatenate([taken.beside for taken in timed])))
        for player, taken in zip(fixed, timed[1:], strict=True):
            work = step_cost(
                player.values, context + clock.HORIZON // 2, model.config, player.decoder.space.axes
            ).total
            ratio = float(np.median(np.divide(taken.seconds, taken.beside)))
            found.append(Timing(context, player.values, *work, base * ratio / clock.HORIZON))
    return found


def fit(timings: Sequence[Timing], device: str, layers: int) -> CostModel:
    """Prices of a byte, of an operation and of what a layer launches."""
    columns = [[getattr(timing, name) for timing in timings] for name in ("bytes", "flops", "seconds")]
    bytes_N, flops_N, seconds_N = columns
    launches = [float(layers)] * len(timings)
    return cost_model.fit(device, bytes_N, flops_N, launches, seconds_N, launches_per_layer=1.0)


def misses(prices: CostModel, timings: Sequence[Timing], layers: int) -> float:
    """The median relative error of what the prices say."""
    said = [prices.seconds(timing.bytes, timing.flops, layers) / timing.seconds - 1 for timing in timings]
    return float(np.median(np.abs(said)))


def report(prices: CostModel, timings: Sequence[Timing], cfg: LlamaConfig) -> str:
    """A line per action, and how far the prices are off, with each context left out of a fit in turn."""
    layers, lines = cfg.num_layers, []
    for timing in timings:
        says = prices.seconds(timing.bytes, timing.flops, layers)
        action = "/".join(f"{x:g}" for x in timing.action)
        took = f"{1e3 * timing.seconds:7.2f} ms, by its prices {1e3 * says:7.2f}"
        lines.append(f"after {timing.context:5d} tokens, {action:12s} {took}")
    left_out = []
    contexts = list(dict.fromkeys(timing.context for timing in timings))
    for context in contexts if len(contexts) > 1 else ():
        rest = [timing for timing in timings if timing.context != context]
        own = [timing for timing in timings if timing.context == context]
        left_out.append(misses(fit(rest, prices.device, layers), own, layers))
    lines.append(f"median error: {misses(prices, timings, layers):.1%}")
    if left_out:
        lines.append(f"of contexts that were left out of the fit: {np.mean(left_out):.1%}")
    return "\n".join(lines)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--episodes", type=int, default=8, help="timed of each action, 16 tokens each")
    parser.add_argument("--rule", choices=tuple(clock.RULES), default="quest", help="as of the clock")
    parser.add_argument("--output", type=path_argument, default=pathlib.Path("runs/prices.json"))
    args = parser.parse_args(argv)
    if args.episodes < 1:
        raise UserError(f"--episodes is {args.episodes} and must be at least 1")
    model = open_model(EMBEDDED, args.dtype)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, kernels="auto"))
    timings = step_timings(model, args.contexts, args.episodes, args.rule)
    device = f"{jax.devices()[0].device_kind}, {args.dtype}"
    prices = fit(timings, device, model.config.num_layers)
    print(report(prices, timings, model.config))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    prices.save(args.output)
    print(f"{args.output}: {prices}")


if __name__ == "__main__":
    main()
