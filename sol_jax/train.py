"""Trains a policy:  python -m sol_jax.train --config configs/sol_j_fl.py:cpu --workdir runs/fl

Starting again in the same workdir resumes.  On several hosts the same command runs on each: see docs/pods.md.
The loop is in `sol_jax.training.loop`.
"""

from collections.abc import Sequence

from absl import app, flags

from sol_jax.command_line import define_flags, define_run_flags, given, given_config, parse_flags
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.files import path_of
from sol_jax.hosts import HostOptions, joined, together
from sol_jax.training.loop import Interrupted, train


@exits_on_user_error
def main(argv: Sequence[str]) -> None:
    del argv
    if flags.FLAGS.config is None or not flags.FLAGS.workdir:
        raise UserError("give --config configs/X.py and --workdir DIR")
    with joined(given(HostOptions)):
        try:
            workdir = together(lambda: path_of(flags.FLAGS.workdir, "--workdir"))
            train(together(given_config), workdir)
        except Interrupted as stopped:
            print(stopped, flush=True)


if __name__ == "__main__":
    define_run_flags(workdir="Folder for checkpoints, metrics and results.")
    define_flags(HostOptions())
    app.run(main, flags_parser=parse_flags)
