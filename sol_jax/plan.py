"""Plans a run before it is paid for:  python -m sol_jax.plan --config configs/demo.py --topology v5e:4x4

Memory per device by part, what passes between devices, how long an update takes at least, whether it fits and
what would make it fit.  TPUs need libtpu (the extra `plan`) and no TPU; GPUs and CPUs are arithmetic.  The
numbers are explained in docs/pods-plan.md; the work is in `sol_jax.planning`.
"""

from collections.abc import Sequence

from absl import app, flags

from sol_jax.command_line import define_flags, define_run_flags, given, given_config, parse_flags
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.planning.options import PlanOptions
from sol_jax.planning.plan import make_plan
from sol_jax.planning.report import text
from sol_jax.planning.topology import EXAMPLES, parse_topology


@exits_on_user_error
def main(argv: Sequence[str]) -> None:
    del argv
    options = given(PlanOptions)
    if flags.FLAGS.config is None or not options.topology:
        raise UserError(f"give --config configs/X.py and --topology NAME, such as {EXAMPLES}")
    topology = parse_topology(options.topology)
    print(text(make_plan(given_config(), topology, compiling=options.compile)), flush=True)


if __name__ == "__main__":
    define_run_flags(workdir="Not used: a command of sol_jax.train can be planned as it is.")
    define_flags(PlanOptions())
    app.run(main, flags_parser=parse_flags)
