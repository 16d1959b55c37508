"""How good a policy is at requested budgets, beside schedules and heuristics of the same cost.

    python -m sol_jax.evaluate --workdir RUN            # scores RUN's best checkpoint on its test split
    python -m sol_jax.evaluate --policy smollm2-135m/sol-j-fl --output wikitext2.csv \\
        --source data/wiki.test.raw.gz --document_start '^ = [^=].* = $' \\
        --grid 20 --num_random 500 --random_budgets 6 --controllers fixed,random,entropy,drift

writes one CSV row per (controller, requested budget) and prints them as a table; every random schedule has
a row in a second CSV.  Killed and started again it goes on where it was: what is scored lies in a folder
beside the CSV.  `random_best` is the best of the random schedules on the very text it is scored on, as the
paper takes it, which favours it.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from pallas_kernels.dispatch import IMPLEMENTATIONS
from sol_jax.errors import UserError, exits_on_user_error, parse_flags
from sol_jax.evaluation import budget_grid as budgets
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.comparison import BASELINES, Plan, Row, Stage, run, summary
from sol_jax.evaluation.provenance import (
    decides,
    describe,
    open_text,
    refuse_training_text,
    training_documents,
)
from sol_jax.evaluation.score_cache import Store
from sol_jax.evaluation.sweep import Sweep
from sol_jax.models.llama import Weights
from sol_jax.rl.train_step import Setup, TrainState
from sol_jax.runs import policy_files
from sol_jax.runs.config import requested
from sol_jax.runs.metrics import progress
from sol_jax.runs.session import Session, read_config
from sol_jax.runs.trained_policy import Subject, open_run, policy_of_run
from sol_jax.text.blocks import Batch, evaluation_batches

__all__ = ["compare", "is_reported", "report", "summary"]  # what training needs

RESULTS = "results.csv"  # in a workdir


def compare(
    weights: Weights,
    params: Any,
    batches: Sequence[Batch],
    asked: budgets.Budgets,
    num_random: int,
    setup: Setup,
    seed: int = 0,
) -> list[Row]:
    """The policy, fixed and random schedules at each budget, without bars and files."""
    sweep = Sweep(weights, params, batches, setup, Store(None, {}), setup.grpo.num_schedules)
    return run(sweep, Plan(asked, num_random=num_random, seed=seed))[0]


def report(
    session: Session, state: TrainState, workdir: pathlib.Path, pause: Callable[[], None] = lambda: None
) -> list[Row]:
    """The comparison at the end of a training, on its test text: a new `results.csv`, and a table.

    The files of an earlier policy stay until everything is computed.  `pause` is called now and then, and may
    raise.
    """
    cfg, setup = session.config, session.setup
    plan = Plan(requested(cfg, setup.space), num_random=cfg.eval.num_random, seed=cfg.seed)
    batches = list(evaluation_batches(session.split("test"), cfg.eval.batch_size, cfg.eval.num_test_blocks))
    sweep = Sweep(session.weights, state.params, batches, setup, Store(None, {}), cfg.grpo.num_schedules)
    subject = Subject(state.params, cfg, workdir.absolute().name, int(state.step))
    about = describe(subject, session, "test", batches) | {"run_updates": subject.updates}
    return run_and_write(sweep, plan, about, workdir / RESULTS, fresh=True, pause=pause)


def is_reported(workdir: pathlib.Path, updates: int) -> bool:
    """Whether `results.csv` is of a run that had made so many updates."""
    path = workdir / RESULTS
    rows = results.read(path) if path.exists() else []
    # An older file lacks the column, and its rows are mostly of the last policy.
    return any(row.get("run_updates", row.get("updates")) == str(updates) for row in rows)


def run_and_write(
    sweep: Sweep,
    plan: Plan,
    about: dict[str, Any],
    output: pathlib.Path,
    fresh: bool = False,
    pause: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Runs the plan, adds its rows to the CSV `output`, prints them as a table; draws have their own CSV.

    With `fresh` the new rows replace all that are there.
    """
    about = about | {"stale_prefill": sweep.stale, "num_random": plan.num_random}
    beside = output.with_name(f"{output.stem}-draws.csv")
    for path in () if fresh else (output, beside):
        results.check_same(path, about)
    names = [axis.name for axis in sweep.setup.space.axes]

    def stage(total: int, done: int, label: str) -> Stage:
        return _bar(total, done, f"{label}, {about['text']}", pause)

    rows, draws = run(sweep, plan, stage)
    put = results.write if fresh else results.merge
    if draws:
        put(beside, results.records(draws, names, about))
    elif fresh:
        beside.unlink(missing_ok=True)  # of an earlier policy
    put(output, results.records(rows, names, about))  # last: with it, everything is there
    print(results.table(rows, names))
    return rows


def _bar(total: int, done: int, label: str, pause: Callable[[], None]) -> Stage:
    """A bar that counts columns (a schedule of every episode of a batch), with an ETA."""
    bar = progress(total, done, label)
    count = done

    def tell(columns: int) -> None:
        nonlocal count
        count += columns
        bar.update(count)
        if count == total:
            bar.close()
        pause()

    return tell


@dataclasses.dataclass(frozen=True)
class Options:
    """What an evaluation is asked for; None stands for what the run's config says."""

    workdir: str | None = None
    policy: str | None = None
    step: int | None = None
    source: str = ""
    document_start: str = ""
    split: str = "test"
    output: str | None = None
    budgets: str | None = None
    grid: int = 0
    controllers: Sequence[str] = ("fixed", "random")
    num_random: int | None = None
    random_budgets: int = 0
    num_blocks: int | None = None
    hold: Sequence[str] = ()
    protect: bool | None = None
    kernels: str | None = None
    restate: bool | None = None
    prefix_len: int | None = None
    stale_prefill: bool = False
    batch_size: int | None = None
    parallel: int | None = None
    seed: int | None = None


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of the training run to evaluate.")
    flags.DEFINE_string("policy", None, "Name of a committed policy, or its folder, instead of a checkpoint.")
    flags.DEFINE_integer("step", None, "Update whose checkpoint of --workdir is taken; default: the best.", 0)
    flags.DEFINE_string("source", "", "Another text than the run's own: as config.data.source.")
    flags.DEFINE_string("document_start", "", "Of --source: as config.data.document_start.")
    flags.DEFINE_string("split", "test", "Of the run's own text.")
    flags.DEFINE_string("output", None, "CSV to add to; default: results.csv of --workdir.")
    flags.DEFINE_string("budgets", None, "Costs per axis, budgets apart by semicolons; default: the run's.")
    flags.DEFINE_integer("grid", 0, "Instead: so many on the diagonal, and half as many along each axis.", 0)
    flags.DEFINE_list("controllers", "fixed,random", f"Of {', '.join(BASELINES)}.")
    flags.DEFINE_integer("num_random", None, "Random schedules per budget; default: the run's.", 0)
    flags.DEFINE_integer("random_budgets", 0, "At so many budgets (of the diagonal); 0: all.", 0)
    flags.DEFINE_integer("num_blocks", None, "Blocks of text; default: the run's.", 1)
    flags.DEFINE_list("hold", "", "Axes; for each, everything is run again with it kept dense.")
    flags.DEFINE_bool("protect", None, "Always keep sinks and window; default: as the run.")
    implementations = ["auto", *IMPLEMENTATIONS]
    flags.DEFINE_enum("kernels", None, implementations, "How decode steps run; default: as the run.")
    flags.DEFINE_bool(
        "restate", None, "Ask for what is left of the budget before each step; default: as the run."
    )
    flags.DEFINE_integer("prefix_len", None, "Tokens before the first episode; default: as the run.", 1)
    flags.DEFINE_bool("stale_prefill", False, "Put in the authors' fault: prefill under left-over budgets.")
    flags.DEFINE_integer("batch_size", None, "Blocks at a time; default: the run's.", 1)
    flags.DEFINE_integer("parallel", None, "Schedules of an episode at a time; default: the run's.", 1)
    flags.DEFINE_integer("seed", None, "Of the random schedules; default: the run's.", 0)


def plan_of(options: Options, config: ConfigDict, setup: Setup) -> Plan:
    """What is compared, of the budgets and controllers asked for; `UserError` if there are no such."""
    for name in options.controllers:
        if name not in BASELINES:
            raise UserError(f"--controllers: there is no {name!r}; there are {', '.join(BASELINES)}")
    names = [axis.name for axis in setup.space.axes]
    for name in options.hold:
        if name not in names:
            raise UserError(f"--hold: there is no axis {name!r}; the axes are {', '.join(names)}")
    if options.budgets and options.grid:
        raise UserError("give --budgets or --grid, not both")
    asked = requested(config, setup.space)
    along: tuple[str, ...] = ()
    if options.budgets:
        asked = budgets.parse(options.budgets, setup.space, "--budgets")
    elif options.grid:
        asked = budgets.diagonal(setup.space, options.grid)
        swept, names_of_swept = budgets.axis_sweeps(setup.space, max(options.grid // 2, 2))
        asked, along = asked + swept, ("",) * len(asked) + names_of_swept
    return Plan(
        asked,
        tuple(options.controllers),
        config.eval.num_random if options.num_random is None else options.num_random,
        budgets.spread(options.random_budgets, along.count("") or len(asked)),
        tuple(options.hold),
        config.seed if options.seed is None else options.seed,
        along,
    )


def evaluate(options: Options) -> list[Row]:
    """The whole of the program; raises `UserError` for whatever is wrong."""
    if not options.workdir and not options.policy:
        raise UserError("give --workdir RUN or --policy NAME")
    if not options.workdir and not options.output:
        raise UserError("give --output FILE.csv with --policy")
    workdir = pathlib.Path(options.workdir or ".")
    of_run: dict[str, Any] = {}
    text = options.source, options.document_start, options.protect, options.kernels
    if options.policy:
        params, own, about = policy_files.load_policy(options.policy)
        config = read_config(workdir) if options.workdir else own
        restate = own.policy.restate if options.restate is None else options.restate
        session = open_text(config, *text, restate, options.prefix_len)
        policy_files.check_fits(options.policy, params, own, config, session.setup)
        subject, trained_on = Subject(params, own, options.policy, about["updates"]), about["documents"]
    else:
        config, checkpoints = open_run(workdir)  # before anything heavy
        session = open_text(config, *text, options.restate, options.prefix_len)
        subject = policy_of_run(checkpoints, config, session.setup, workdir.absolute().name, options.step)
        trained_on = training_documents(config, session)
        of_run["run_updates"] = checkpoints.latest_step()  # the best policy may be an earlier one
    refuse_training_text(session, options.split, trained_on)
    print(f"evaluating the policy of update {subject.updates}")
    plan = plan_of(options, config, session.setup)
    limit = options.num_blocks or config.eval.num_test_blocks or None
    blocks = session.split(options.split)
    batches = list(evaluation_batches(blocks, options.batch_size or config.eval.batch_size, limit))
    output = pathlib.Path(options.output) if options.output else workdir / RESULTS
    if "swapped" in plan.controllers and sum(len(batch.tokens_BxN) for batch in batches) < 2:
        raise UserError("--controllers: swapped needs at least two blocks of text; raise --num_blocks")
    store = Store(output.with_suffix(".scores"), decides(session, batches, options.stale_prefill))
    parallel = options.parallel or config.grpo.num_schedules
    sweep = Sweep(
        session.weights, subject.params, batches, session.setup, store, parallel, options.stale_prefill
    )
    return run_and_write(sweep, plan, describe(subject, session, options.split, batches) | of_run, output)


@exits_on_user_error
def main(argv: Sequence[str]) -> None:
    del argv
    given: dict[str, Any] = {f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(Options)}
    evaluate(Options(**given))


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=parse_flags)
