"""Downstream tasks under a policy, beside dense decoding and schedules of the same cost (figure 6).

    python -m experiments.tasks.downstream --policy smollm2-135m/sol-j-fl --data FOLDER --limit 200 \\
        --budgets '0.3,0.55,0.5;0.5,0.7,0.65' --random 4 \\
        --output experiments/results/smollm2-135m/downstream-sol-j-fl-s0.csv

Reads items as `experiments.tasks.prompts` describes and writes one row per task, controller and requested
budget: accuracy with its 95 % interval (Wilson), McNemar's exact test of the policy against that controller
on the same items, nats per token of the right answer, and realised costs.  Records of single items go to
`NAME-items/` beside the CSV, so that a killed sweep goes on; they are not committed.  Schedules are matched
to the costs that the policy realised on the task.  `random_best` is the draw that was right most often on
the very items it is judged by, which favours it.

On several hosts the same command runs on each (docs/pods.md): they share requests out, and the first writes.
"""

import argparse
import dataclasses
import functools
import pathlib
import random
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.tasks import item_records, prompts
from experiments.tasks.item_records import ItemRecord
from experiments.tasks.sweep import TaskRun, TaskSweep
from sol_jax import hosts
from sol_jax.digests import array_digest, digest
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluation import budget_grid as budgets
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.statistics import document_bootstrap, mcnemar, wilson
from sol_jax.files import path_argument
from sol_jax.generation.engine import Engine
from sol_jax.generation.load_engine import open_engine, show_log
from sol_jax.hosts import HostOptions
from sol_jax.options import described
from sol_jax.runs.metrics import progress
from sol_jax.runs.session import commit

# By which processes join; they and --data differ, whose items must be the same.
JOINING = tuple(described(HostOptions()))
# Rows that differ in one of these never share a file.
IDENTITY = ("run", "model", "dtype", "limit", "seed", "horizon")


def row(
    task: str, controller: str, asked: Mapping[str, float], mine: list[ItemRecord], policy: list[ItemRecord]
) -> dict[str, Any]:
    """A line of the CSV: one controller, beside the policy on the same items.

    `nats` are per token of the right answer, and `gain` is how many fewer the policy takes, with its 95 %
    interval over items.
    """
    names, cost_X = list(asked), item_records.mean_cost(mine)
    found: dict[str, Any] = {"task": task, "controller": controller}
    found |= {f"requested_{name}": value for name, value in asked.items()}
    found |= {f"cost_{name}": float(x) for name, x in zip(names, cost_X, strict=True)}
    found |= {"net": float(cost_X.mean()), **item_records.shares(mine), "items": len(mine)}
    for name, column in (("accuracy", "right"), ("accuracy_norm", "right_norm")):
        right_N, other_N = ([getattr(record, column) for record in part] for part in (mine, policy))
        # A reference solution is the only choice: always right, which says nothing.
        if None in right_N or len(mine[0].logp) == 1:
            continue
        low, high = wilson(sum(right_N), len(right_N))
        found |= {name: float(np.mean(right_N)), f"{name}_low": low, f"{name}_high": high}
        if controller != "policy":
            found[f"{name}_p"] = mcnemar(np.array(other_N), np.array(right_N))
    tokens_N = np.array([record.tokens for record in mine])
    found |= {"nats": "", "tokens": int(tokens_N.sum())}
    if mine[0].logp:
        nats_N, policy_N = (np.array([-r.logp[r.answer] / r.tokens for r in part]) for part in (mine, policy))
        found["nats"] = float(np.average(nats_N, weights=tokens_N))
        each = np.repeat(nats_N - policy_N, tokens_N), np.repeat(np.arange(len(mine)), tokens_N)
        found |= dict(zip(("gain", "gain_low", "gain_high"), document_bootstrap(*each), strict=True))
    return found | {"note": results.NOTES.get(controller, "")}


def rows(sweep: TaskSweep, asked: budgets.Budgets, report: Callable[[int], None]) -> list[dict[str, Any]]:
    """Runs one task; all its lines of the CSV."""
    names, found = [axis.name for axis in sweep.engines["dense"].cfg.space.axes], []
    dense = sweep.run(TaskRun("dense"), report)
    for budget in asked:
        policy = sweep.run(TaskRun("policy", budget), report)
        ran = [sweep.run(task_run, report) for task_run in sweep.matched_schedules(policy)]
        by_name = {"policy": policy, "fixed": ran[0], "dense": dense}
        if len(ran) > 1:
            by_name["random_best"] = max(ran[1:], key=_draw_score)
        requested = dict(zip(names, budget, strict=True))
        found += [row(sweep.task, name, requested, mine, policy) for name, mine in by_name.items()]
    return found


def _draw_score(records: Sequence[ItemRecord]) -> tuple[float, ...]:
    """What the best of random schedules is chosen by: items that are right, then their likelihood."""
    return sum(r.right for r in records), sum(r.logp[r.answer] if r.logp else 0.0 for r in records)


def sample(examples: Sequence[prompts.Example], limit: int, seed: int) -> list[prompts.Example]:
    """The first `limit` of a seeded shuffle (all for 0), longest first."""
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    chosen = [examples[n] for n in order[: limit or None]]
    return sorted(chosen, key=lambda e: (-max(len(c) + len(x) for c, x in e.pairs), e.name))


def engines(policy: Engine) -> dict[str, Engine]:
    """The engine of the policy, and those of the same model under other controllers."""

    def under(controller: str) -> Engine:
        cfg = dataclasses.replace(policy.cfg, policy=None, refresh=controller != "dense")
        return Engine(policy.weights, policy.tokenizer, cfg, controller)

    return {"policy": policy} | {name: under(name) for name in ("dense", "fixed", "random")}


def rows_of_other_tasks(
    path: pathlib.Path, about: Mapping[str, Any], names: Sequence[str]
) -> list[dict[str, str]]:
    """The rows of other tasks in a CSV that goes on; `UserError` if it is about something else."""
    if not path.is_file():
        return []
    old, ours = results.read(path), results.texts(about)
    for name in IDENTITY:
        if old[0].get(name) != ours[name]:
            raise UserError(
                f"{path} holds results of {name} {old[0].get(name)!r}, and these are of {ours[name]!r}; "
                "name another --output"
            )
    return [line for line in old if line["task"] not in names]


def downstream(args: argparse.Namespace) -> None:
    """Runs the tasks one by one; the CSV grows by one task at a time."""
    names = prompts.named(args.tasks.split(","))
    if min(args.limit, args.random, args.seed) < 0 or args.batch_size < 1:
        raise UserError("--limit, --random and --seed must be at least 0, and --batch_size at least 1")
    apart = {"data", *(flag.name for flag in JOINING)}
    hosts.check_same("--", {name: str(value) for name, value in vars(args).items() if name not in apart})
    examples = hosts.together(
        lambda: {name: sample(prompts.load(args.data, name), args.limit, args.seed) for name in names}
    )
    asked: list[budgets.Budgets] = []

    def check(policy: Engine) -> None:
        space = policy.cfg.space
        asked.append(
            budgets.parse(args.budgets, space, "--budgets") if args.budgets else budgets.diagonal(space, 3)
        )

    policy = hosts.together(
        lambda: open_engine(args.model, args.policy, "policy", args.dtype, args.kernels, check)
    )
    seen: dict[str, Any] = {
        f"items of {name}": digest([dataclasses.astuple(x) for x in mine]) for name, mine in examples.items()
    }
    seen |= {"model": policy.identity, "policy": array_digest(policy.params)}
    hosts.check_same("the content of the ", seen)
    model = pathlib.PurePath(args.model.removeprefix("hub:")).name
    about = {"run": args.policy, "model": model, "dtype": args.dtype, "limit": args.limit, "seed": args.seed}
    about |= {"horizon": policy.cfg.horizon, "draws": args.random, "commit": commit()}
    kept = hosts.together(
        lambda: rows_of_other_tasks(args.output, about, names) if hosts.first() else []
    )  # of which the first process alone makes use
    under, folder = engines(policy), args.output.with_name(f"{args.output.stem}-items")
    sweeps = [
        TaskSweep(name, examples[name], under, folder, args.batch_size, args.random, args.seed)
        for name in names
    ]
    task_runs = 1 + len(asked[0]) * (2 + args.random)
    done = [sum(_count_on_disk(sweep, asked[0]) for sweep in sweeps)]
    bar = progress(sum(task_runs * len(sweep.examples) for sweep in sweeps), done[0], "items")

    def report(items: int) -> None:
        done[0] += items
        bar.update(done[0])

    for sweep in sweeps:
        kept += [results.texts(line | about) for line in rows(sweep, asked[0], report)]
        hosts.together(functools.partial(_write, args.output, kept))
    bar.close()
    if hosts.first():
        print(table(kept))


def _write(path: pathlib.Path, lines: Sequence[dict[str, str]]) -> None:
    if hosts.first():
        results.write(path, lines)


def _count_on_disk(sweep: TaskSweep, asked: budgets.Budgets) -> int:
    """Records that are there; of schedules, where the policy's are complete, for they depend on it."""
    count = len(sweep.records_on_disk(TaskRun("dense")))
    for budget in asked:
        policy = sweep.records_on_disk(TaskRun("policy", budget))
        count += len(policy)
        if len(policy) == len(sweep.examples):
            count += sum(len(sweep.records_on_disk(task_run)) for task_run in sweep.matched_schedules(policy))
    return count


def table(lines: Sequence[Mapping[str, str]]) -> str:
    """The main columns, for people."""
    head = f"{'task':24} {'controller':12} {'net':>6} {'bytes':>6} {'FLOPs':>6} {'acc':>6}    [95 %]     "
    head += f"{'norm':>6} {'p':>6} {'nats':>7}"
    told = [head, "-" * len(head)]
    for line in lines:

        def value(name: str, digits: int = 3, line: Mapping[str, str] = line) -> str:
            return f"{float(line[name]):.{digits}f}" if line.get(name) else ""

        span = f"{value('accuracy_low')} {value('accuracy_high')}"
        told.append(
            f"{line['task']:24} {line['controller']:12} {value('net'):>6} {value('bytes'):>6} "
            f"{value('flops'):>6} {value('accuracy'):>6} {span:^15} {value('accuracy_norm'):>6} "
            f"{value('accuracy_p'):>6} {value('nats', 4):>7}"
        )
    return "\n".join(told)


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", required=True, help="a policy's name or folder, or a run's workdir")
    parser.add_argument("--data", type=path_argument, required=True, help="folder of task folders")
    parser.add_argument("--output", type=path_argument, required=True, help="CSV to write")
    parser.add_argument("--model", default="smollm2-135m", help="a folder, a .gguf file, hub:OWNER/NAME")
    parser.add_argument("--tasks", default="arc_easy,piqa,winogrande,mmlu,gsm8k", help="commas between")
    parser.add_argument("--limit", type=int, default=200, help="items of a task, by a seeded shuffle; 0: all")
    parser.add_argument("--budgets", default="", help="costs per axis; semicolons between; default: three")
    parser.add_argument("--random", type=int, default=0, help="random schedules per budget")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle and of random schedules")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--kernels", default="auto")
    for flag in JOINING:
        kind = int if flag.kind in (int, int | None) else str
        parser.add_argument(
            f"--{flag.name}", type=kind, default=flag.value, help=flag.meaning, choices=_choices(flag.kind)
        )
    args = parser.parse_args()
    with hosts.joined(HostOptions(**{flag.name: getattr(args, flag.name) for flag in JOINING})):
        if hosts.first():
            show_log()
        downstream(args)


def _choices(kind: Any) -> tuple[Any, ...] | None:
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else None


if __name__ == "__main__":
    main()
