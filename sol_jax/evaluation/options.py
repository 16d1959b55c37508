"""The flags of `sol_jax.evaluate`, and the comparison that they stand for."""

import dataclasses

from pallas_kernels.dispatch import IMPLEMENTATIONS
from sol_jax.errors import UserError
from sol_jax.evaluation import budget_grid
from sol_jax.evaluation.comparison import BASELINES, ComparisonPlan
from sol_jax.options import MOST_SEED, Options, option
from sol_jax.rl.setup import Setup
from sol_jax.runs.config import RunConfig


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(Options):
    """None stands for what the run's config says."""

    where = "--"
    workdir: str | None = option(None, "folder of the training run to evaluate", path=True)
    policy: str | None = option(
        None, "name of a published policy, its folder or hub:OWNER/NAME, instead of a checkpoint", path=True
    )
    step: int | None = option(
        None, "update whose checkpoint of --workdir is taken; default: the best", at_least=0
    )
    model: str | None = option(None, "where the run's model is now; default: where it was", path=True)
    run_text: str | None = option(None, "where the run's own text is now; default: where it was", path=True)
    source: str = option("", "another text than the run's own: as config.data.source", path=True)
    document_start: str = option("", "of --source: as config.data.document_start")
    split: str = option("test", "of the run's own text")
    output: str | None = option(None, "CSV to add to; default: results.csv of --workdir", path=True)
    budgets: str | None = option(
        None, "costs per axis, with semicolons between budgets; default: those of the run"
    )
    grid: int = option(
        0, "instead: so many budgets on the diagonal, and half as many along each axis", at_least=0
    )
    controllers: tuple[str, ...] = option(("fixed", "random"), f"of {', '.join(BASELINES)}")
    num_random: int | None = option(None, "random schedules per budget; default: as the run", at_least=0)
    random_budgets: int = option(
        0, "random schedules at so many budgets (of the diagonal); 0: all", at_least=0
    )
    num_blocks: int | None = option(None, "blocks of text; default: as the run", at_least=1)
    hold: tuple[str, ...] = option((), "axes; for each, everything is run again with it kept dense")
    protect: bool | None = option(None, "always keep sinks and window; default: as the run")
    kernels: str | None = option(
        None, "how decode steps run; default: as the run", choices=("auto", *IMPLEMENTATIONS)
    )
    restate: bool | None = option(
        None, "ask for what is left of the budget before each step; default: as the run"
    )
    restate_steps: int | None = option(
        None, "steps at least over which a miss is made up; default: as the run", at_least=1
    )
    one_budget: str | None = option(
        None,
        "one budget for all axes, which the policy may split: the mean keep rate, or the share of a dense "
        "step's bytes, operations or time; default: as the run",
        choices=("net", "bytes", "operations", "time"),
    )
    prefix_len: int | None = option(None, "tokens before the first episode; default: as the run", at_least=1)
    stale_prefill: bool = option(False, "put in the authors' fault: prefill under left-over budgets")
    batch_size: int | None = option(None, "blocks at a time; default: as the run", at_least=1)
    parallel: int | None = option(None, "schedules of an episode at a time; default: as the run", at_least=1)
    mesh_model: int = option(
        1, "devices that share one copy of the weights; all others share the work", at_least=1
    )
    seed: int | None = option(
        None, "of the random schedules; default: as the run", at_least=0, at_most=MOST_SEED
    )

    def check(self) -> None:
        for name in self.controllers:
            if name not in BASELINES:
                raise UserError(f"--controllers: there is no {name!r}; there are {', '.join(BASELINES)}")
        if self.budgets and self.grid:
            raise UserError("give --budgets or --grid, not both")

    def check_complete(self) -> None:
        """Raises `UserError` unless there is something to evaluate and a place for what comes of it."""
        if not self.workdir and not self.policy:
            raise UserError("give --workdir RUN or --policy NAME")
        if not self.workdir and not self.output:
            raise UserError("give --output FILE.csv with --policy")

    def plan(self, config: RunConfig, setup: Setup) -> ComparisonPlan:
        """What is compared; `UserError` if a budget or an axis that is asked for does not exist."""
        space = setup.space
        if "best_fixed" in self.controllers and not setup.policy.axis_shares:
            raise UserError("--controllers: best_fixed splits one budget for all axes; give --one_budget")
        names = [axis.name for axis in space.axes]
        for name in self.hold:
            if name not in names:
                raise UserError(f"--hold: there is no axis {name!r}; the axes are {', '.join(names)}")
        asked = config.requested(space)
        along: tuple[str, ...] = ()
        if self.budgets:
            asked = budget_grid.parse(self.budgets, space, "--budgets", setup.policy.axis_shares)
        elif self.grid:
            asked = budget_grid.diagonal(space, self.grid)
            swept, names_of_swept = budget_grid.axis_sweeps(space, max(self.grid // 2, 2))
            asked, along = asked + swept, ("",) * len(asked) + names_of_swept
        return ComparisonPlan(
            asked,
            self.controllers,
            config.eval.num_random if self.num_random is None else self.num_random,
            budget_grid.spread(self.random_budgets, along.count("") or len(asked)),
            self.hold,
            config.seed if self.seed is None else self.seed,
            along,
        )
