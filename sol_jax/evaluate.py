"""How good a policy is at requested budgets, beside dense, fixed and random schedules at the same cost.

    python -m sol_jax.evaluate --workdir RUN            # scores RUN's best checkpoint on its test split

writes `RUN/results.csv`, one row per (controller, requested budget), and prints it as a table.  Every
comparison is paired: all controllers decode the same tokens after the same dense prefill, and intervals
are bootstrapped over documents.
"""

import contextlib
import csv
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

from sol_jax import schedules
from sol_jax.config import flatten
from sol_jax.data import Batch, evaluation_batches
from sol_jax.errors import UserError, exits_on_user_error, parse_flags
from sol_jax.llama import Weights
from sol_jax.metrics import progress
from sol_jax.rollout import Controller, policy_controller, replay
from sol_jax.session import Session, commit, open_session, read_config
from sol_jax.state import Checkpoints
from sol_jax.statistics import document_bootstrap
from sol_jax.update import Setup, init_state, prefill_blocks, run_schedules, score


class Scores(NamedTuple):
    """What J schedules of every episode did: N blocks, W episodes each."""

    logp_NxWxJ: np.ndarray  # mean over the steps, nats per token
    cost_NxWxJxX: np.ndarray  # mean over the controllable steps
    action_NxWxJxT: np.ndarray


@functools.partial(jax.jit, static_argnames=("setup", "chunk"))
def _run(
    weights: Weights, params: Any, tokens_BxN: jax.Array, given_BxWxJxY: jax.Array, setup: Setup, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`Scores` of one batch: one prefill, then `chunk` of the J schedules of each episode at a time."""
    episode, _ = prefill_blocks(weights, tokens_BxN, setup)

    def of_chunk(given: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        if params is None:
            controller, budget = replay(given), jnp.zeros((*given.shape[:3], len(setup.space.axes)))
        else:
            greedy = policy_controller(setup.network, params, temperature=1.0, greedy=True)
            memory = jax.tree.map(lambda x: jnp.broadcast_to(x, (*given.shape[:3], *x.shape)), greedy.memory)
            controller, budget = Controller(greedy.act, memory), given
        rollout = run_schedules(weights, episode, jax.random.key(0), budget, controller, setup)
        logp = score(weights, rollout, episode.label_T, setup.memory.head_rows)
        counted = rollout.controllable_T[..., None]
        mean_cost = jnp.sum(rollout.cost_TxX * counted, -2) / jnp.maximum(jnp.sum(counted, -2), 1)
        return jnp.mean(logp, -1), mean_cost, rollout.action_T

    def chunks_first(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]), 2, 0)

    def chunks_joined(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:])

    logp, mean_cost, action = lax.map(of_chunk, chunks_first(given_BxWxJxY))
    return chunks_joined(logp), chunks_joined(mean_cost), chunks_joined(action)


def run_blocks(
    weights: Weights,
    batches: Sequence[Batch],
    given_NxWxJxY: np.ndarray,
    setup: Setup,
    params: Any = None,
    progress: Callable[[], None] = lambda: None,
) -> Scores:
    """Runs J schedules of every episode of every block.

    With `params` the greedy policy picks the actions and `given` are the budgets requested of it (Y = X);
    without, `given` are the schedules themselves (Y = T).  Short batches and odd J are padded, so that
    each shape compiles once.
    """
    B, J = len(batches[0].tokens_BxN), given_NxWxJxY.shape[2]
    chunk = min(setup.grpo.num_schedules, J)
    columns = np.arange(-(-J // chunk) * chunk) % J
    pieces, start = [], 0
    for batch in batches:
        count = len(batch.tokens_BxN)
        rows = np.arange(B) % count
        given = given_NxWxJxY[start : start + count][rows][:, :, columns]
        scores = _run(weights, params, batch.tokens_BxN[rows], given, setup, chunk)
        pieces.append([np.asarray(x)[:count, :, :J] for x in scores])
        start += count
        progress()
    return Scores(*(np.concatenate(parts) for parts in zip(*pieces, strict=True)))


@dataclasses.dataclass(frozen=True)
class Row:
    """One controller at one requested budget.  Costs and `net` are realised; nats are per token.

    `gain` is the policy's mean log-probability minus this controller's, on the same tokens, with its 95 %
    interval over documents.  `net` is the mean of the axes' episode-average costs (sol.md section 1).
    """

    controller: str
    requested: tuple[float, ...]
    cost: tuple[float, ...]
    net: float
    nats: float
    perplexity: float
    gain: float
    gain_low: float
    gain_high: float
    tokens: int


def compare(
    weights: Weights,
    params: Any,
    batches: Sequence[Batch],
    budget_JxX: np.ndarray,
    num_random: int,
    setup: Setup,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> list[Row]:
    """The policy at each budget, and dense, fixed and random schedules at the costs it realised."""
    N = sum(len(batch.tokens_BxN) for batch in batches)
    W, T = setup.episode.episodes_per_prefix, setup.episode.horizon
    document_N = np.concatenate([batch.document_B for batch in batches])
    given = np.broadcast_to(budget_JxX, (N, W, *budget_JxX.shape))
    policy = run_blocks(weights, batches, given, setup, params, progress)
    rng = np.random.default_rng(seed)
    may_control = schedules.controllable(setup.episode, N)
    plans = [schedules.dense(setup.space, N * W, T)[:, None]]
    for target_X in policy.cost_NxWxJxX.mean((0, 1)):
        plans.append(schedules.fixed(setup.space, target_X, may_control)[:, None])
        plans.append(schedules.random(setup.space, target_X, may_control, num_random, rng))
    action_NxWxJxT = np.concatenate(plans, 1).reshape(N, W, -1, T)
    others = run_blocks(weights, batches, action_NxWxJxT, setup, progress=progress)
    return _rows(policy, others, budget_JxX, num_random, document_N, T)


def _rows(
    policy: Scores, others: Scores, budget_JxX: np.ndarray, num_random: int, document_N: np.ndarray, T: int
) -> list[Row]:
    def row(name: str, requested: np.ndarray, own: tuple, reference_N: np.ndarray) -> Row:
        logp_N, cost_X = own
        gain = document_bootstrap(reference_N - logp_N, document_N)
        cost = tuple(float(c) for c in cost_X)
        nats, tokens = -float(logp_N.mean()), policy.logp_NxWxJ[..., 0].size * T
        asked = tuple(float(c) for c in requested)
        return Row(name, asked, cost, float(np.mean(cost_X)), nats, float(np.exp(nats)), *gain, tokens)

    def schedule(scores: Scores, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        logp_N = scores.logp_NxWxJ[:, :, columns].mean((1, 2))
        return logp_N, scores.cost_NxWxJxX[:, :, columns].mean((0, 1, 2))

    rows = []
    dense = schedule(others, slice(0, 1))
    for j, requested in enumerate(budget_JxX):
        own = schedule(policy, slice(j, j + 1))
        first = 1 + j * (1 + num_random)
        drawn = slice(first + 1, first + 1 + num_random)
        rows.append(row("policy", requested, own, own[0]))
        rows.append(row("fixed", requested, schedule(others, slice(first, first + 1)), own[0]))
        if num_random:
            best = first + 1 + int(np.argmax(others.logp_NxWxJ[:, :, drawn].mean((0, 1))))
            rows.append(row("random", requested, schedule(others, drawn), own[0]))
            rows.append(row("random_best", requested, schedule(others, slice(best, best + 1)), own[0]))
        rows.append(row("dense", requested, dense, own[0]))
    return rows


def summary(rows: Sequence[Row], setup: Setup) -> dict[str, float]:
    """Scalars for the training log, averaged over the requested budgets.

    `eval/penalty` is the training penalty of the realised mean costs, so `eval/score` is what training
    tries to raise, and what the best checkpoint has most of.
    """
    policy = [row for row in rows if row.controller == "policy"]
    miss_JxX = np.abs([np.subtract(row.cost, row.requested) for row in policy])
    weight_X = np.array([axis.penalty_weight for axis in setup.space.axes])
    penalty = np.mean(np.sum(weight_X * np.maximum(miss_JxX - setup.grpo.dead_zone, 0) ** 2, -1))
    nats = np.mean([row.nats for row in policy])
    scalars = {"eval/nats": nats, "eval/penalty": penalty, "eval/score": -nats - penalty}
    scalars |= {
        f"eval/budget_gap/{a.name}": g for a, g in zip(setup.space.axes, miss_JxX.mean(0), strict=True)
    }
    for name in ("fixed", "random", "random_best", "dense"):
        gains = [row.gain for row in rows if row.controller == name]
        if gains:
            scalars[f"eval/gain_over_{name}"] = np.mean(gains)
    return {name: float(value) for name, value in scalars.items()}


def write_csv(path: pathlib.Path, rows: Iterable[Row], axis_names: Sequence[str], **about: Any) -> None:
    """One line per row, with `about` (seed, commit, config ...) repeated on each."""
    with open(path, "w", newline="") as file:
        writer = None
        for row in rows:
            record = dataclasses.asdict(row)
            for field in ("requested", "cost"):
                values = record.pop(field)
                record |= {f"{field}_{name}": round(v, 5) for name, v in zip(axis_names, values, strict=True)}
            record |= about
            if writer is None:
                writer = csv.DictWriter(file, record)
                writer.writeheader()
            writer.writerow(record)


def table(rows: Sequence[Row], axis_names: Sequence[str]) -> str:
    """The rows as text, one block per requested budget."""
    costs = "cost " + "/".join(axis_names)
    head = f"{'controller':12} {costs:>22} {'net':>6} {'ppl':>9}   gain of the policy, nats/token"
    lines = [head, "-" * len(head)]
    for row in rows:
        if row.controller == "policy":
            lines.append("requested " + " / ".join(f"{c:.3f}" for c in row.requested))
        cost = " / ".join(f"{c:.3f}" for c in row.cost)
        gain = f"{row.gain:+.4f} [{row.gain_low:+.4f}, {row.gain_high:+.4f}]"
        shown = "" if row.controller == "policy" else gain
        lines.append(f"{row.controller:12} {cost:>22} {row.net:6.3f} {row.perplexity:9.2f}   {shown}")
    return "\n".join(lines)


def report(session: Session, params: Any, workdir: pathlib.Path, split: str = "test") -> list[Row]:
    """Compares a policy with the schedules on `split`; writes `results.csv`, prints the table."""
    config = session.config
    blocks = session.split(split)
    batches = list(evaluation_batches(blocks, config.eval.batch_size, config.eval.num_test_blocks))
    budget_JxX = np.array(config.eval.budgets, np.float32)
    bar, done = progress(2 * len(batches), 0, f"evaluating on {split} text"), itertools.count(1)
    with contextlib.closing(bar):
        rows = compare(
            session.weights,
            params,
            batches,
            budget_JxX,
            config.eval.num_random,
            session.setup,
            config.seed,
            lambda: bar.update(next(done)),
        )
    names = [axis.name for axis in session.setup.space.axes]
    documents = len(set(np.concatenate([batch.document_B for batch in batches]).tolist()))
    write_csv(
        workdir / "results.csv",
        rows,
        names,
        split=split,
        documents=documents,
        blocks=sum(len(batch.tokens_BxN) for batch in batches),
        num_random=config.eval.num_random,
        seed=config.seed,
        commit=commit(),
    )
    print(table(rows, names))
    return rows


@exits_on_user_error
def main(argv: Sequence[str]) -> None:
    del argv
    workdir = pathlib.Path(flags.FLAGS.workdir)
    config = read_config(workdir)
    session = open_session(config)
    checkpoints = Checkpoints(workdir, flatten(config), config.train.keep, read_only=True)
    restored = checkpoints.restore(init_state(jax.random.key(0), session.setup), checkpoints.best_step())
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint; --workdir must be the folder of a training run")
    step, state, _ = restored
    print(f"evaluating the policy of update {step}")
    report(session, state.params, workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the training run to evaluate.", required=True)
    app.run(main, flags_parser=parse_flags)
