"""One experiment end to end: says how long it will take here, trains, evaluates and draws.

    python -m experiments.reproduce --config configs/sol_j_2l.py:cpu --config.train.num_updates=300
    python -m experiments.reproduce --config configs/sol_j_fl.py:cpu --workdir runs/fl --seconds_only

Started again it goes on where it was.  Leaves checkpoints, `metrics.jsonl`, `results.csv` and `front.png` in
`--workdir` (default: `runs/` and the config's name).  `--source` names another text to test on.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments.figures import front, plots
from sol_jax import evaluate, train
from sol_jax.costs import update as flops
from sol_jax.errors import UserError, exits_on_user_error, parse_flags
from sol_jax.evaluate import Options, plan_of
from sol_jax.evaluation.provenance import open_text
from sol_jax.rl.train_step import GrpoConfig, Setup
from sol_jax.runs.session import open_session
from sol_jax.text.blocks import Blocks

# Of the rate of a large matrix product: what updates and evaluations of SmolLM2-135M reach on a CPU.  On an
# accelerator a policy and a model this small reach less, and the estimate is a lower bound.
SHARE = 0.5


def evaluation_flops(setup: Setup, num_blocks: int, columns: int) -> float:
    """Operations of `columns` schedules of every episode of some blocks, each block prefilled once."""
    grpo = dataclasses.replace(GrpoConfig(), num_schedules=columns, divergence_weight=0.0)
    each = flops.update_flops(dataclasses.replace(setup, grpo=grpo), num_blocks)
    return each["prefill"] + each["rollout"] + each["head"]


def columns_of(options: Options, config: ConfigDict, setup: Setup) -> int:
    """Schedules of every episode that the evaluation runs."""
    plan = plan_of(options, config, setup)
    matched = len([name for name in plan.controllers if name != "random"])
    per_hold = len(plan.budgets) * (1 + matched) + len(plan.drawn) * plan.num_random
    return 1 + per_hold * len(plan.holds)


def updates_of(config: ConfigDict, blocks: Blocks) -> int:
    """How many updates the run makes."""
    return config.train.num_updates or len(blocks) // config.grpo.batch_size


def estimate(config: ConfigDict, setup: Setup, updates: int, options: Options) -> dict[str, float]:
    """Seconds of the training and of the evaluation, from a matrix product measured now."""
    rate = SHARE * flops.matmul_rate(setup.model.dtype)
    update = sum(flops.update_flops(setup, config.grpo.batch_size).values())
    validations = updates // config.eval.every if config.eval.every else 0
    own = Options()
    validation = evaluation_flops(setup, config.eval.num_blocks, columns_of(own, config, setup))
    blocks = options.num_blocks or config.eval.num_test_blocks
    test = evaluation_flops(setup, blocks, columns_of(options, config, setup))
    return {"training": (updates * update + validations * validation) / rate, "evaluation": test / rate}


def clock(seconds: float) -> str:
    """Seconds as people say them."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def name_of(config_path: str) -> str:
    """`configs/sol_j_fl.py:cpu,t4` -> `sol_j_fl-cpu-t4`."""
    path, _, variants = config_path.partition(":")
    return "-".join(re.findall(r"[\w.]+", f"{pathlib.PurePath(path).stem},{variants}"))


def reproduce(config: ConfigDict, workdir: pathlib.Path, options: Options, seconds_only: bool) -> None:
    """Everything; each stage goes on where it was."""
    session = open_session(config)
    updates = updates_of(config, session.split("train"))
    seconds = estimate(config, session.setup, updates, options)
    print(
        f"this will take about {clock(sum(seconds.values()))} here: {updates} updates "
        f"{clock(seconds['training'])}, evaluation {clock(seconds['evaluation'])} "
        f"(if half of a large matrix product's rate is reached); files go to {workdir}",
        flush=True,
    )
    if seconds_only:
        return
    del session
    open_text(config, options.source, options.document_start).split("test")  # before the training, not after
    config.eval.num_test_blocks = 0  # the evaluation below tests, on the best checkpoint and in more detail
    train.train(config, workdir)
    evaluate.evaluate(options)
    rows = plots.read(workdir / "results.csv")
    print(f"drew {plots.save(front.draw(rows), workdir / 'front.png')}")


@exits_on_user_error
def main(argv: Sequence[str]) -> None:
    del argv
    args = flags.FLAGS
    if args.config is None:
        raise UserError("give --config configs/X.py:VARIANTS")
    args.config.lock()
    named = config_flags.get_config_filename(args["config"])
    workdir = pathlib.Path(args.workdir or f"runs/{name_of(named)}")
    options = Options(
        workdir=str(workdir),
        source=args.source,
        document_start=args.document_start,
        grid=args.grid,
        controllers=tuple(args.controllers),
        num_random=args.num_random,
        random_budgets=args.random_budgets,
        num_blocks=args.num_blocks,
    )
    try:
        reproduce(args.config, workdir, options, args.seconds_only)
    except train.Interrupted as stopped:
        logging.info("%s", stopped)


def _define_flags() -> None:
    """Besides --config and --workdir, which `train` defines."""
    flags.DEFINE_string("source", "", "Text to test on; default: the test split of the training text.")
    flags.DEFINE_string("document_start", "", "Of --source, as config.data.document_start.")
    flags.DEFINE_integer("grid", 20, "Budgets on the diagonal; half as many along each axis.", 1)
    flags.DEFINE_list("controllers", "fixed,fixed_official,random,entropy,drift", "Compared with the policy.")
    flags.DEFINE_integer("num_random", 500, "Random schedules per budget.", 0)
    flags.DEFINE_integer("random_budgets", 6, "Budgets that have random schedules.", 0)
    flags.DEFINE_integer("num_blocks", 50, "Blocks of test text.", 1)
    flags.DEFINE_bool("seconds_only", False, "Says how long it would take, and stops.")


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=parse_flags)
