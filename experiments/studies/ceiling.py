"""What is there to win?  Every token at every level of an axis, before days of training.

    python -m experiments.studies.ceiling --source data/wikitext2/wiki.test.raw.gz \\
        --document_start '^ = [^=].* = $' --prefixes 256,1024 --folder runs/ceiling

Text is scored under the schedules of `sol_jax.rl.counterfactual`: the levels of each step in random order, so
that each token meets each level once and what earlier steps left in the cache averages out.  One axis at a
time has all its levels while the others are dense; `joint` has all of them, 16 joint actions of every token.

Prints, and writes to `ceiling.csv` in `--folder`, per axis, prefix and mean cost what the fixed mix of the
two nearest levels loses against dense decoding, and what others win back at the same mean cost, in nats a
token with 95 % intervals over documents:

  - *oracle*: per token the level with the least KL(dense || step) plus price times cost, one price for the
    text.  It knows the token's KL, but not its label: no controller does better but by luck.
  - *probe*: the same with KL predicted by a ridge regression on what a policy sees (the hidden state before
    the step, the token's embedding, the number of the step), fitted on training text.

For `joint` they are beside the best blind choice among the same actions, at a mean net keep rate.
`levels.csv` has loss and KL of every level.  `ceiling.png` draws the gains, with those of `--results` beside
them: CSVs of `sol_jax.evaluate` of policies for one axis.  Batches in the folder are not scored again.
An axis of one's own (docs/add-an-axis.md) is one of `--axes` too, with its `--levels`.
"""

import argparse
import csv
import functools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import counterfactual, sol_j_fl
from experiments.figures import plots
from experiments.studies import allocation
from sol_jax.axes.base import Axis
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluation import results_csv
from sol_jax.evaluation.provenance import open_text
from sol_jax.evaluation.statistics import document_bootstrap
from sol_jax.models import llama
from sol_jax.models.llama import Weights
from sol_jax.rl.collect import beside_dense, prefill_blocks, run_schedules, score_labels
from sol_jax.rl.counterfactual import permuted_actions
from sol_jax.rl.rollout import dense_divergence, replay
from sol_jax.rl.setup import Setup
from sol_jax.runs.config import RunConfig
from sol_jax.runs.metrics import progress
from sol_jax.runs.session import Session, open_session
from sol_jax.text.blocks import BlockIterator, evaluation_batches

JOINT = "joint"
JOINT_ACTIONS = 16  # of every token
# Between the cheapest level and the dearest.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
BATCH = 2


class Scored(NamedTuple):
    """Steps under K actions each; N = blocks x episodes x steps."""

    action_NxK: np.ndarray
    logp_NxK: np.ndarray  # of the label
    kl_NxK: np.ndarray  # KL(dense || step)
    dense_N: np.ndarray  # the label's log-probability under the dense model
    hidden_NxD: np.ndarray  # the dense model's, before the step
    token_N: np.ndarray
    step_N: np.ndarray
    document_N: np.ndarray


@functools.partial(jax.jit, static_argnames=("setup", "num_actions"))
def score(
    weights: Weights, tokens_BxN: jax.Array, key: jax.Array, setup: Setup, num_actions: int
) -> dict[str, jax.Array]:
    """One batch of blocks under `num_actions` permuted schedules: the arrays of `Scored`, [B, W, ...]."""
    blocks, rows = prefill_blocks(weights, tokens_BxN, setup, with_dense=True), setup.memory.head_rows
    episodes, dense = blocks.episodes, blocks.dense_hidden
    assert dense is not None
    action = permuted_actions(key, episodes.token.shape, num_actions, setup.space)  # [B, W, T, K]
    schedule = jnp.moveaxis(action, -1, 2)
    no_budget = jnp.zeros((*schedule.shape[:-1], len(setup.space.axes)))
    rollout = run_schedules(weights, blocks, key, no_budget, replay(schedule), setup)
    logp = score_labels(weights, rollout.hidden, episodes.label, rows)
    kl = beside_dense(dense_divergence, weights, rollout.hidden, dense, rows)
    of_dense = score_labels(weights, dense[:, :, None], episodes.label, rows)[:, :, 0]
    before = jnp.concatenate([episodes.hidden[:, :, None], dense[:, :, :-1]], 2)
    step = jnp.broadcast_to(jnp.arange(setup.episode.horizon), episodes.token.shape)
    found = {"action_NxK": action, "logp_NxK": jnp.moveaxis(logp, 2, -1), "kl_NxK": jnp.moveaxis(kl, 2, -1)}
    found |= {"dense_N": of_dense, "hidden_NxD": before, "token_N": episodes.token, "step_N": step}
    return found


def scored(session: Session, batches: Iterator[Any], total: int, folder: pathlib.Path, label: str) -> Scored:
    """All batches, from the files in `folder` where they are there.

    Raises `UserError` for files of another text, or of another model or other rules of its steps.
    """
    rules = json.dumps(session.setup.rules.identity() | session.identity, sort_keys=True, default=str)
    folder.mkdir(parents=True, exist_ok=True)
    axes = session.setup.space.axes
    K = next((len(axis.levels) for axis in axes if not axis.idle), 1)
    if sum(not axis.idle for axis in axes) > 1:
        K = JOINT_ACTIONS
    parts, bar = [], progress(total, 0, label)
    for i, batch in zip(range(total), batches, strict=False):
        file = folder / f"{i:04d}.npz"
        if not file.exists():
            arrays = score(
                session.weights, batch.tokens_BxN, jax.random.key(i), setup=session.setup, num_actions=K
            )
            W, T = arrays["token_N"].shape[1:]
            document = np.repeat(batch.document_B, W * T)
            kept: Any = {name: np.asarray(x).reshape(-1, *x.shape[3:]) for name, x in arrays.items()}
            unfinished = file.with_suffix(".tmp.npz")
            np.savez(unfinished, rules=rules, document_N=document, tokens_BxN=batch.tokens_BxN, **kept)
            unfinished.replace(file)
        with np.load(file) as found:
            if not np.array_equal(found["tokens_BxN"], batch.tokens_BxN):
                raise UserError(f"{file} is of another text; give another --folder, or remove it")
            if str(found["rules"]) != rules:
                raise UserError(
                    f"{file} is of another model or other rules; give another --folder, or remove it"
                )
            parts.append(Scored(*(found[name] for name in Scored._fields)))
        bar.update(i + 1, "")
    bar.close()
    return Scored(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def by_level(steps: Scored, value_NxK: np.ndarray) -> np.ndarray:
    """Values in the order of the levels [N, A], of steps that met each of an axis' levels once."""
    found = np.empty_like(value_NxK)
    np.put_along_axis(found, steps.action_NxK, value_NxK, -1)
    return found


def features(steps: Scored, weights: Weights) -> np.ndarray:
    """What a policy sees of each step and its token, [N, F], float32."""
    embed = np.asarray(jax.vmap(lambda token: llama.embed(weights, token))(jnp.asarray(steps.token_N)))
    place = np.eye(steps.step_N.max() + 1, dtype=np.float32)[steps.step_N]
    return np.concatenate([steps.hidden_NxD, embed, place], -1).astype(np.float32)


def axis_rows(axis: Axis, steps: Scored, predicted_NxA: np.ndarray | None) -> list[dict[str, Any]]:
    """The rows of one axis with the step to itself."""
    cost_A = np.array([axis.cost(level) for level in axis.levels])
    kl_NxA, logp_NxA = by_level(steps, steps.kl_NxK), by_level(steps, steps.logp_NxK)
    rows = []
    for share in SHARES:
        target = float(cost_A[0] + share * (cost_A[-1] - cost_A[0]))
        fixed_N = allocation.fixed_mix(logp_NxA, axis, target)
        rows.append({"cost": target, **_columns("fixed_loses", steps.dense_N - fixed_N, steps.document_N)})
        for name, loss_NxA in (("oracle", kl_NxA), ("probe", predicted_NxA)):
            if loss_NxA is not None:
                chosen_N = allocation.allocate(loss_NxA, cost_A, target)
                gain_N = allocation.taken(logp_NxA, chosen_N) - fixed_N
                rows[-1] |= _columns(name, gain_N, steps.document_N)
    return rows


def joint_rows(axes: Sequence[Axis], steps: Scored, cost_AxX: np.ndarray) -> list[dict[str, Any]]:
    """The rows of the joint space: costs are net keep rates, the baseline is the best blind choice."""
    counts = [len(axis.levels) for axis in axes]
    level_NxKxX = np.stack(np.unravel_index(steps.action_NxK, counts), -1)
    blind_NxK = allocation.additive_means(steps.kl_NxK, level_NxKxX, counts)
    cost_NxK = cost_AxX[steps.action_NxK].mean(-1)
    low, rows = float(cost_AxX[0].mean()), []
    for share in SHARES:
        target = low + share * (1 - low)
        blind_N, seeing_N = (
            allocation.taken(steps.logp_NxK, allocation.allocate(loss_NxK, cost_NxK, target))
            for loss_NxK in (blind_NxK, steps.kl_NxK)
        )
        rows.append({"cost": target, **_columns("fixed_loses", steps.dense_N - blind_N, steps.document_N)})
        rows[-1] |= _columns("oracle", seeing_N - blind_N, steps.document_N)
    return rows


def _columns(name: str, value_N: np.ndarray, document_N: np.ndarray) -> dict[str, float]:
    return dict(
        zip((name, f"{name}_low", f"{name}_high"), document_bootstrap(value_N, document_N), strict=True)
    )


def level_rows(axes: Sequence[Axis], steps: Scored) -> list[dict[str, Any]]:
    """Loss against dense decoding and KL at every level; in the joint space with the other axes at random."""
    counts = [len(axis.levels) for axis in axes]
    level_NxKxX, rows = np.stack(np.unravel_index(steps.action_NxK, counts), -1), []
    for x, axis in enumerate(axes):
        for i, level in enumerate(axis.levels if not axis.idle else ()):
            there = level_NxKxX[..., x] == i
            loss = (steps.dense_N[:, None] - steps.logp_NxK)[there].mean()
            rows.append({"of": axis.name, "level": level, "loses": loss, "kl": steps.kl_NxK[there].mean()})
    return rows


def parse_levels(text: str, axis: str) -> tuple[float, ...]:
    """The levels of an axis that the shipped config leaves at one; `UserError` if they are no numbers."""
    try:
        levels = tuple(float(level) for level in text.split(","))
    except ValueError:
        levels = ()
    if len(levels) < 2:
        raise UserError(f"--levels={text!r} must be the levels of {axis}, ascending, with commas between")
    return levels


def leave_alone(given: ConfigDict, chosen: str, levels: tuple[float, ...]) -> None:
    """Gives an axis its levels, and every other one its dearest alone."""
    for axis in axis_names():
        given.axes[axis].levels = levels if axis == chosen else given.axes[axis].levels[-1:]
    given.axes[chosen].budget = (levels[0], levels[-1])
    given.eval.budgets = ((1.0,),)  # all axes at their dearest: nothing here asks for budgets


def axis_names() -> list[str]:
    """All axes that a config has, also those that somebody added."""
    return list(RunConfig().axes.each())


def study(
    axis: str, prefix: int, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of `ceiling.csv` and `levels.csv` of one axis (or `joint`) after one length of prefix."""
    shipped = axis if axis in sol_j_fl.ALONE else ""
    given = counterfactual.get_config(",".join(filter(None, [shipped, "cpu", args.variants])))
    if not shipped and axis != JOINT:
        leave_alone(given, axis, parse_levels(args.levels, axis))
    given.model.path, given.episode.prefix_len, given.data.source = args.model, prefix, args.train_source
    given.axes.kappa.protect = args.protect
    config = RunConfig.from_dict(given.to_dict())
    held_out = open_text(config, args.source, args.document_start)
    blocks, folder = held_out.split("test"), args.folder / f"{axis}-{prefix}"
    total = min(args.blocks, len(blocks)) // BATCH
    batches = evaluation_batches(blocks, BATCH, total * BATCH)
    steps = scored(held_out, batches, total, folder / "held-out", f"{axis} after {prefix}, held-out text")
    space, predicted_NxA = held_out.setup.space, None
    about = {"axis": axis, "prefix": prefix, "tokens": len(steps.token_N), "model": args.model}
    if axis == JOINT:
        rows = joint_rows(space.axes, steps, space.costs_AxX)
    else:
        (alone,) = (candidate for candidate in space.axes if not candidate.idle)
        if args.train_blocks:
            session = open_session(config)
            iterator = iter(BlockIterator(session.split("train"), batch_size=BATCH, seed=0))
            count = args.train_blocks // BATCH
            train = scored(
                session, iterator, count, folder / "train", f"{axis} after {prefix}, training text"
            )
            ridge = allocation.Ridge(features(train, session.weights), by_level(train, train.kl_NxK))
            predicted_NxA = ridge.predict(features(steps, session.weights))
        rows = axis_rows(alone, steps, predicted_NxA)
    return [about | row for row in rows], [about | row for row in level_rows(space.axes, steps)]


def write(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """A CSV with all columns that any row has; numbers to five digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def draw(rows: Sequence[dict[str, Any]], results: Sequence[pathlib.Path], path: pathlib.Path) -> None:
    """Gains against mean cost: a panel per axis and prefix."""
    panels = list(dict.fromkeys((row["axis"], row["prefix"]) for row in rows))
    figure, axes = plots.plt.subplots(
        1, len(panels), figsize=(3.4 * len(panels), 3.2), squeeze=False, layout="constrained"
    )
    styles = {"oracle": ("#3f3f3f", "knows each token's KL"), "probe": ("#1f5f8b", "linear probe")}
    for ax, (axis, prefix) in zip(axes[0], panels, strict=True):
        there = [row for row in rows if (row["axis"], row["prefix"]) == (axis, prefix)]
        for name, (color, label) in styles.items():
            if name in there[0]:
                cost, *gain = zip(
                    *((r["cost"], r[name], r[f"{name}_low"], r[f"{name}_high"]) for r in there), strict=True
                )
                ax.plot(cost, gain[0], color=color, label=label, marker=".")
                ax.fill_between(cost, gain[1], gain[2], color=color, alpha=0.15, linewidth=0)
        for file in results:
            found = [
                row for row in results_csv.read(file) if row["controller"] == "fixed" and not row["held"]
            ]
            if axis != JOINT and found and _alone(found) == (axis, prefix):
                points = sorted((float(row[f"cost_{axis}"]), float(row["gain"])) for row in found)
                ax.plot(*zip(*points, strict=True), color="#b3301c", marker="o", label=f"policy {file.stem}")
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set_title(f"{axis}, prefix of {prefix}", fontsize=10)
        ax.set_xlabel("mean cost" if axis != JOINT else "net keep rate")
    axes[0, 0].set_ylabel("gain over a blind choice\nof the same cost, nats per token")
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def _alone(rows: Sequence[dict[str, str]]) -> tuple[str, int]:
    """The axis that was controlled alone, or "" if there were several, and the prefix."""
    names = [name.removeprefix("cost_") for name in rows[0] if name.startswith("cost_")]
    moved = [name for name in names if any(float(row[f"cost_{name}"]) < 1 for row in rows)]
    return (moved[0] if len(moved) == 1 else "", int(rows[0]["prefix"]))


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="as config.model.path")
    parser.add_argument("--source", default="", help="held-out text; default: test split of --train_source")
    parser.add_argument("--document_start", default="", help="of --source, as config.data.document_start")
    parser.add_argument("--train_source", default="wikipedia", help="text for the probe")
    parser.add_argument("--axes", default="kappa,rho,eta,joint", help="of kappa, rho, eta, joint, your own")
    parser.add_argument("--levels", default="", help="of an axis of your own, by commas")
    parser.add_argument(
        "--prefixes", default="256", help="tokens before the first episode, several by commas"
    )
    parser.add_argument("--variants", default="", help="of the config: quest for the original Quest's rules")
    parser.add_argument("--protect", action="store_true", help="kappa always keeps sinks and window")
    parser.add_argument("--blocks", type=int, default=62, help="of held-out text, 64 tokens each")
    parser.add_argument("--train_blocks", type=int, default=80, help="for the probe; 0: no probe")
    parser.add_argument("--results", type=pathlib.Path, nargs="*", default=[], help="CSVs to draw beside")
    parser.add_argument(
        "--folder", type=pathlib.Path, required=True, help="for CSVs, plot and what is scored"
    )
    args = parser.parse_args(argv)
    chosen = args.axes.split(",")
    known = [*axis_names(), JOINT]
    if unknown := set(chosen) - {*known}:
        raise UserError(f"--axes: there is no {sorted(unknown)[0]!r}; there are {', '.join(known)}")
    if args.blocks < BATCH or args.train_blocks < 0:
        raise UserError(f"--blocks must be at least {BATCH}, --train_blocks at least 0")
    try:
        prefixes = [int(prefix) for prefix in args.prefixes.split(",")]
    except ValueError:
        raise UserError(f"--prefixes={args.prefixes!r} must be whole numbers with commas between") from None
    found = [study(axis, prefix, args) for prefix in prefixes for axis in chosen]
    rows, levels = ([row for part in parts for row in part] for parts in zip(*found, strict=True))
    write(args.folder / "ceiling.csv", rows)
    write(args.folder / "levels.csv", levels)
    draw(rows, args.results, args.folder / "ceiling.png")
    for row in rows:
        gains = ", ".join(
            f"{name} {row[name]:+.3f} [{row[f'{name}_low']:+.3f}, {row[f'{name}_high']:+.3f}]"
            for name in ("oracle", "probe")
            if name in row
        )
        where = f"{row['axis']} after {row['prefix']} at {row['cost']:.2f}"
        print(f"{where}: fixed loses {row['fixed_loses']:.3f}; {gains}")


if __name__ == "__main__":
    main()
