"""Runs and writes comparisons: at the end of a training, and as `sol_jax.evaluate` asks for them."""

import functools
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

from sol_jax import hosts
from sol_jax.errors import telling_of_memory
from sol_jax.evaluation import results_csv
from sol_jax.evaluation.budget_grid import Budgets
from sol_jax.evaluation.comparison import ComparisonPlan, ComparisonRow, Progress, run
from sol_jax.evaluation.options import EvaluateOptions
from sol_jax.evaluation.provenance import (
    decides,
    describe,
    found_at,
    open_text,
    refuse_training_text,
    training_documents,
)
from sol_jax.evaluation.score_cache import ScoreCache
from sol_jax.evaluation.sweep import Sweep
from sol_jax.files import path_of
from sol_jax.hosts import AgreedError
from sol_jax.models.llama import Weights
from sol_jax.rl.learn import TrainState
from sol_jax.rl.setup import Setup
from sol_jax.runs import policy_files
from sol_jax.runs.config import read_config
from sol_jax.runs.metrics import progress
from sol_jax.runs.session import Session
from sol_jax.runs.trained_policy import TrainedPolicy, open_run, policy_of_run
from sol_jax.text.blocks import Batch, evaluation_batches

RESULTS = "results.csv"  # in a workdir


def compare_quietly(
    weights: Weights,
    params: Any,
    batches: Sequence[Batch],
    asked: Budgets,
    num_random: int,
    setup: Setup,
    seed: int = 0,
) -> list[ComparisonRow]:
    """The policy, fixed and random schedules at each budget, without bars and files."""
    sweep = Sweep(weights, params, batches, setup, ScoreCache(None, {}), setup.grpo.num_schedules)
    return run(sweep, ComparisonPlan(asked, num_random=num_random, seed=seed))[0]


def report_run(
    session: Session, state: TrainState, workdir: pathlib.Path, pause: Callable[[], None] = lambda: None
) -> list[ComparisonRow]:
    """The comparison at the end of a training, on its test text: a new `results.csv`, and a table.

    The files of an earlier policy stay until everything is computed.  `pause` is called now and then, and may
    raise.
    """
    cfg, setup = session.config, session.setup
    plan = ComparisonPlan(cfg.requested(setup.space), num_random=cfg.eval.num_random, seed=cfg.seed)
    batches = list(evaluation_batches(session.split("test"), cfg.eval.batch_size, cfg.eval.num_test_blocks))
    sweep = Sweep(session.weights, state.params, batches, setup, ScoreCache(None, {}), cfg.grpo.num_schedules)
    policy = TrainedPolicy(state.params, cfg, workdir.absolute().name, int(state.step))
    about = describe(policy, session, "test", batches) | {"run_updates": policy.updates}
    return run_and_write(sweep, plan, about, workdir / RESULTS, fresh=True, pause=pause)


def is_reported(workdir: pathlib.Path, updates: int) -> bool:
    """Whether `results.csv` is of a run that had made so many updates."""
    path = workdir / RESULTS
    rows = results_csv.read(path) if path.exists() else []
    # An older file lacks the column, and its rows are mostly of the last policy.
    return any(row.get("run_updates", row.get("updates")) == str(updates) for row in rows)


def run_and_write(
    sweep: Sweep,
    plan: ComparisonPlan,
    about: dict[str, Any],
    output: pathlib.Path,
    fresh: bool = False,
    pause: Callable[[], None] = lambda: None,
) -> list[ComparisonRow]:
    """Runs the plan, adds its rows to the CSV `output`, prints them as a table; draws have their own CSV.

    With `fresh` the new rows replace all that are there.
    """
    about = about | {"stale_prefill": sweep.stale, "num_random": plan.num_random}
    beside = output.with_name(f"{output.stem}-draws.csv")
    for path in () if fresh else (output, beside):
        hosts.together(functools.partial(results_csv.check_same, path, about))
    names = [axis.name for axis in sweep.setup.space.axes]

    def bar(total: int, done: int, label: str) -> Progress:
        return _bar(total, done, f"{label}, {about['text']}", pause)

    rows, draws = run(sweep, plan, bar)
    if not hosts.first():
        return rows
    put = results_csv.write if fresh else results_csv.merge
    if draws:
        put(beside, results_csv.records(draws, names, about))
    elif fresh:
        beside.unlink(missing_ok=True)  # of an earlier policy
    put(output, results_csv.records(rows, names, about))  # last: with it, everything is there
    print(results_csv.table(rows, names))
    return rows


def _bar(total: int, done: int, label: str, pause: Callable[[], None]) -> Progress:
    """A bar that counts entries times batches, with an ETA."""
    bar = progress(total, done, label)
    count = done

    def tell(entries: int) -> None:
        nonlocal count
        count += entries
        bar.update(count)
        if count == total:
            bar.close()
        pause()

    return tell


def evaluate(options: EvaluateOptions) -> list[ComparisonRow]:
    """All that `sol_jax.evaluate` does; raises `UserError` for whatever is wrong."""
    hosts.together(options.check_complete)
    workdir = hosts.together(lambda: path_of(options.workdir or ".", "--workdir"))
    policy, session, trained_on, of_run = hosts.together(lambda: _opened(options, workdir))
    hosts.together(lambda: refuse_training_text(session, options.split, trained_on))
    if hosts.first():
        print(f"evaluating the policy of update {policy.updates}")
    config = session.config
    plan = hosts.together(lambda: options.plan(config, session.setup))
    limit = options.num_blocks or config.eval.num_test_blocks or None
    blocks = hosts.together(lambda: session.split(options.split))
    batches = list(evaluation_batches(blocks, options.batch_size or config.eval.batch_size, limit))
    if "swapped" in plan.controllers and sum(len(batch.tokens_BxN) for batch in batches) < 2:
        raise AgreedError("--controllers: swapped needs at least two blocks of text; raise --num_blocks")
    output = hosts.together(lambda: path_of(options.output or workdir / RESULTS, "--output"))
    about = decides(session, batches, options.stale_prefill)
    kept = output.with_suffix(".scores") if hosts.first() else None
    store = hosts.together(lambda: ScoreCache(kept, about, found_at(session)))
    parallel = options.parallel or config.grpo.num_schedules
    played = session.weights, policy.params, batches, session.setup, store, parallel, options.stale_prefill
    sweep = hosts.together(lambda: Sweep(*played))
    return run_and_write(sweep, plan, describe(policy, session, options.split, batches) | of_run, output)


@telling_of_memory()
def evaluate_policy(policy: str | pathlib.Path, **options: Any) -> list[ComparisonRow]:
    """How good a policy is at requested budgets, beside schedules of the same cost.

    Args:
      policy: its name or folder, which needs `output=`, a CSV file; or the workdir of a training run.
      options: fields of `EvaluateOptions`, as the flags of `sol_jax.evaluate`: `source="wiki.txt"`,
        `budgets="0.4,0.6,0.5"`, `controllers=("fixed", "random")`, `num_blocks=8` ...

    Returns:
      One row per controller and budget.

    Raises `UserError` for whatever is wrong with these.
    """
    is_run = (path_of(policy, "the policy") / "checkpoints").is_dir()
    return evaluate(EvaluateOptions.from_dict({"workdir" if is_run else "policy": str(policy), **options}))


def _opened(
    options: EvaluateOptions, workdir: pathlib.Path
) -> tuple[TrainedPolicy, Session, Collection[str], dict[str, Any]]:
    """The policy, its model on the text, its training documents, and what rows say of its run."""
    text = options.source, options.document_start, options.protect, options.kernels, options.mesh_model
    moved = {"model.path": options.model, "data.source": options.run_text}
    moved = {name: place for name, place in moved.items() if place}
    if options.policy:
        params, own, about = policy_files.load_policy(options.policy)
        config = (read_config(workdir) if options.workdir else own).with_fields(moved)
        asked = own.policy.asked(options.restate, options.restate_steps, options.one_budget)
        how = asked.restate, asked.restate_steps, options.prefix_len, asked.one_budget
        session = open_text(config, *text, *how)
        policy_files.check_fits(options.policy, params, own, about, config, session.setup, session.identity)
        policy = TrainedPolicy(params, own, options.policy, about["updates"])
        return policy, session, about["documents"], {}
    config, checkpoints = open_run(workdir)  # before anything heavy
    config = config.with_fields(moved)
    as_asked = options.restate, options.restate_steps, options.prefix_len, options.one_budget
    session = open_text(config, *text, *as_asked)
    checkpoints.bind(session.identity | config.identity())
    policy = policy_of_run(checkpoints, config, session.setup, workdir.absolute().name, options.step)
    # The best policy may be an earlier one.
    return (
        policy,
        session,
        training_documents(config, session, workdir),
        {"run_updates": checkpoints.latest_step()},
    )
