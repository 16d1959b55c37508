"""One experiment end to end: says how long it will take here, trains, evaluates and draws.

    python -m experiments.reproduce --config configs/sol_j_2l.py:cpu --config.train.num_updates=300
    python -m experiments.reproduce --config configs/sol_j_fl.py:cpu --workdir runs/fl --seconds_only

Started again it goes on where it was.  Leaves checkpoints, `metrics.jsonl`, `results.csv` and `front.png` in
`--workdir` (default: `runs/` and the config's name).  `--source` names another text to test on.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.figures import front, plots
from sol_jax.command_line import define_flags, define_run_flags, given, given_config, parse_flags
from sol_jax.errors import exits_on_user_error
from sol_jax.evaluation.options import EvaluateOptions
from sol_jax.evaluation.provenance import open_text
from sol_jax.evaluation.report import evaluate
from sol_jax.files import local_path
from sol_jax.options import Options, option
from sol_jax.runs.config import RunConfig
from sol_jax.runs.session import open_session
from sol_jax.training.estimate import clock, estimated_seconds, updates_of
from sol_jax.training.loop import Interrupted, train


def name_of(config_path: str) -> str:
    """`configs/sol_j_fl.py:cpu,t4` -> `sol_j_fl-cpu-t4`."""
    path, _, variants = config_path.partition(":")
    return "-".join(re.findall(r"[\w.]+", f"{pathlib.PurePath(path).stem},{variants}"))


def reproduce(config: RunConfig, workdir: pathlib.Path, options: EvaluateOptions, seconds_only: bool) -> None:
    """Everything; each stage goes on where it was."""
    session = open_session(config)
    updates = updates_of(config, session.split("train"))
    seconds = estimated_seconds(config, session.setup, updates, options)
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
    # The evaluation below tests, on the best checkpoint and in more detail.
    train(config.with_fields({"eval.num_test_blocks": 0}), workdir)
    evaluate(options)
    rows = plots.read(workdir / "results.csv")
    print(f"drew {plots.save(front.draw(rows), workdir / 'front.png')}")


@dataclasses.dataclass(frozen=True)
class ReproduceOptions(Options):
    """Besides --config and --workdir."""

    where = "--"
    source: str = option("", "text to test on; default: the test split of the training text", path=True)
    document_start: str = option("", "of --source, as config.data.document_start")
    grid: int = option(20, "budgets on the diagonal; half as many along each axis", at_least=1)
    controllers: tuple[str, ...] = option(
        ("fixed", "fixed_official", "random", "entropy", "drift"), "compared with the policy"
    )
    num_random: int = option(500, "random schedules per budget", at_least=0)
    random_budgets: int = option(6, "budgets that have random schedules", at_least=0)
    num_blocks: int = option(50, "blocks of test text", at_least=1)
    seconds_only: bool = option(False, "says how long it would take, and stops")


@exits_on_user_error
def main(argv: Sequence[str]) -> None:
    del argv
    config = given_config()
    named = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = local_path(flags.FLAGS.workdir or f"runs/{name_of(named)}", "--workdir")
    asked = given(ReproduceOptions)
    fields = {name: value for name, value in asked.to_dict().items() if name != "seconds_only"}
    options = EvaluateOptions(workdir=str(workdir), **fields)
    try:
        reproduce(config, workdir, options, asked.seconds_only)
    except Interrupted as stopped:
        logging.info("%s", stopped)


if __name__ == "__main__":
    define_run_flags(workdir="Folder of the run; default: runs/, named after the config.")
    define_flags(ReproduceOptions())
    app.run(main, flags_parser=parse_flags)
