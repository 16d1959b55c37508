"""A run's config: every option in one frozen dataclass, and what the code below the entry points makes of it.

A config file gives an ml_collections `ConfigDict`, so that `--config.grpo.gamma=0.5` works.  It ends where a
run
begins: `RunConfig.from_dict(config.to_dict())` refuses impossible values by name before anything heavy
starts.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from pallas_kernels import cost_model
from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.errors import UnavailableError
from sol_jax.axes.base import ActionSpace, Axis, AxisContext, check_budgets
from sol_jax.axes.config import AxesConfig
from sol_jax.costs.decode_step import axis_shares, in_unit
from sol_jax.digests import digest
from sol_jax.errors import UserError
from sol_jax.files import parse_json, path_of
from sol_jax.models.llama import LlamaConfig
from sol_jax.options import MOST_SEED, Options, option, section
from sol_jax.rl.config import (
    CounterfactualConfig,
    EpisodeConfig,
    GrpoConfig,
    MemoryConfig,
    OptimConfig,
    PolicyConfig,
)
from sol_jax.rl.policy import PolicySpec
from sol_jax.rl.rollout import EpisodeRules
from sol_jax.rl.setup import Setup

MOST_STEPS = 2**31 - 1  # of an update: what arrays are indexed by


@dataclasses.dataclass(frozen=True)
class ModelConfig(Options):
    """The frozen language model."""

    where = "config.model."
    path: str = option("smollm2-135m", "or a Hugging Face folder, a .gguf file, hub:OWNER/NAME", path=True)
    dtype: Literal["float32", "bfloat16"] = option("float32", "of weights, caches and matmul operands")


@dataclasses.dataclass(frozen=True)
class DataConfig(Options):
    """The text, and how it is split."""

    where = "config.data."
    source: str = option(
        "wikipedia", "or globs of .txt/.jsonl/.gz files, tfds:NAME[/CONFIG][:SPLIT]", path=True
    )
    document_start: str = option("", "regular expression found in the first line of each document")
    validation_fraction: float = option(0.05, "of the documents", at_least=0, at_most=1)
    test_fraction: float = option(0.05, "of the documents", at_least=0, at_most=1)
    cache_dir: str = option("", "of prepared blocks; empty: ~/.cache/sol_jax", path=True)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Options):
    """The loop."""

    where = "config.train."
    num_updates: int = option(0, "0: one pass over the training blocks", at_least=0)
    log_every: int = option(1, "updates", at_least=1)
    checkpoint_every: int = option(50, "updates", at_least=1)
    keep: int = option(3, "latest checkpoints that are kept, besides the best one", at_least=1)
    wandb: str = option("", "project of Weights & Biases that gets the metrics too; empty: none")

    def check(self) -> None:
        if set(self.wandb) & set("/\\#?%:") or len(self.wandb) > 128:  # as wandb has it
            raise self.wrong("wandb", "a project's name: at most 128 characters, and none of / \\ # ? % :")


@dataclasses.dataclass(frozen=True)
class EvalConfig(Options):
    """Evaluations while training, and at its end."""

    where = "config.eval."
    every: int = option(50, "updates; 0: only at the end", at_least=0)
    num_blocks: int = option(16, "of the validation split, while training", at_least=1)
    num_test_blocks: int = option(64, "of the test split, at the end; 0: no final evaluation", at_least=0)
    batch_size: int = option(8, "blocks at a time", at_least=1)
    budgets: tuple[tuple[float, ...], ...] = option(
        (
            (0.25, 0.5, 0.4),
            (0.4, 0.6, 0.5),
            (0.55, 0.7, 0.625),
            (0.7, 0.8, 0.75),
            (0.85, 0.9, 0.875),
        ),
        "requested mean costs, one number per axis; axes left out at the end ask for their dearest level",
    )
    num_random: int = option(16, "random schedules per block and budget", at_least=0)


@dataclasses.dataclass(frozen=True)
class MeshConfig(Options):
    """How the devices share the work.  It never changes what is learned beyond rounding."""

    where = "config.mesh."
    data: int = option(
        -1, "rows of the mesh, which share out the blocks of a batch; -1: as many as there can be"
    )
    model: int = option(
        1,
        "devices of a row, which share one copy of the weights, for models that do not fit on one",
        at_least=1,
    )
    chunk: int = option(
        0,
        "blocks that a row plays at a time; 0: as the run began, with one row all of them, else one.  Runs "
        "of one chunk end with equal parameters on any number of devices; larger chunks are faster",
        at_least=0,
    )

    def check(self) -> None:
        if self.data != -1 and self.data < 1:
            raise self.wrong("data", "-1, or at least 1")


@dataclasses.dataclass(frozen=True)
class RunConfig(Options):
    """Everything that a training run is told.  Defaults are the paper's for two levels per axis."""

    where = "config."
    seed: int = option(0, "of everything that is drawn", at_least=0, at_most=MOST_SEED)
    learner: Literal["grpo", "counterfactual"] = option(
        "grpo", "the paper's; counterfactual: predict what each level loses, from tokens met at every level"
    )
    start_from: str = option(
        "", "a policy: the folder of a run, a published name or hub:OWNER/NAME; empty: a fresh one"
    )
    kernels: str = option(
        "auto",
        "how decode steps run: by platform and shape, or a named implementation, or why not",
        choices=("auto", *IMPLEMENTATIONS),
    )
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    episode: EpisodeConfig = section(EpisodeConfig)
    axes: AxesConfig = section(AxesConfig)
    policy: PolicyConfig = section(PolicyConfig)
    grpo: GrpoConfig = section(GrpoConfig)
    counterfactual: CounterfactualConfig = section(CounterfactualConfig)
    optim: OptimConfig = section(OptimConfig)
    train: TrainConfig = section(TrainConfig)
    eval: EvalConfig = section(EvalConfig)
    memory: MemoryConfig = section(MemoryConfig)
    mesh: MeshConfig = section(MeshConfig)

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> "RunConfig":
        """The config of an earlier run or policy from its `flat` form.

        A field that came after it has its default: what the code did before.
        """
        return cls().with_fields(flat)

    @property
    def axis_context(self) -> AxisContext:
        return AxisContext(self.kernels, self.episode.sinks, self.episode.window)

    def check(self) -> None:
        steps = self.grpo.batch_size * self.grpo.num_schedules
        steps *= self.episode.episodes_per_prefix * self.episode.horizon
        if steps > MOST_STEPS:  # where sizes overflow, XLA ends the process without a word
            raise self.grpo.wrong(
                "num_schedules",
                "less: grpo.batch_size * grpo.num_schedules * episode.episodes_per_prefix * episode.horizon "
                f"= {steps} steps of an update, and arrays count to {MOST_STEPS}",
            )
        if self.mesh.chunk > self.grpo.batch_size:
            raise self.mesh.wrong("chunk", f"at most config.grpo.batch_size = {self.grpo.batch_size}")
        if self.mesh.model > 1 and self.kernels not in ("auto", "xla"):
            raise self.wrong(
                "kernels", "auto or xla where config.mesh.model is above 1: XLA cannot cut kernels"
            )
        if self.learner == "counterfactual" and not self.policy.predict_losses:
            raise self.policy.wrong("predict_losses", "true where config.learner is counterfactual")
        if self.grpo.credit == "axis" and not (self.policy.factored_head or self.policy.predict_losses):
            raise self.grpo.wrong(
                "credit", "action, or policy.factored_head true: axes must be drawn independently"
            )
        self._check_unread()
        axes = self.axes.build(self.axis_context)
        if not self.eval.budgets:
            raise self.eval.wrong("budgets", "a list of at least one budget")
        for budget in self.eval.budgets:
            if not 0 < len(budget) <= len(axes):
                raise self.eval.wrong("budgets", f"tuples of {len(axes)} costs, one per axis")
            for axis, cost in zip(axes, budget, strict=False):
                if len(axis.levels) > 1:  # a single-level axis is at its level, whatever is asked
                    check_budgets(axis, (cost,), "config.eval.budgets")

    def _check_unread(self) -> None:
        """Raises `UserError` for a changed field that the chosen learner does not look at."""
        shared = {"batch_size", "num_schedules", *(["price_memory"] if self.policy.predict_losses else [])}
        other = self.grpo if self.learner == "counterfactual" else self.counterfactual
        for field in dataclasses.fields(other):
            if field.name not in shared and getattr(other, field.name) != field.default:
                raise other.wrong(
                    field.name, f"{field.default}, for the learner {self.learner} has no use for it"
                )

    def check_here(self) -> None:
        """Raises `UserError` for what this machine lacks: named kernels, or the file of a cost model.

        Apart from `check`, for a run or a policy of another machine can be read here and told otherwise.
        """
        self.prices()
        if self.kernels not in ("auto", "xla"):  # which need no device to be looked for yet
            try:
                choose("attend", self.kernels)
            except UnavailableError as error:
                raise UserError(f"config.kernels: {error}") from None

    def prices(self) -> cost_model.CostModel | None:
        """The cost model behind budgets in time; None if there are none in time."""
        field = "axes.budget_unit" if self.axes.budget_unit == "time" else "policy.one_budget"
        if "time" not in (self.axes.budget_unit, self.policy.one_budget):
            return None
        if not self.axes.prices:
            raise self.axes.wrong("prices", f"a cost model (a JSON file), for {field} is 'time'")
        try:
            return cost_model.load(path_of(self.axes.prices, "config.axes.prices"))
        except ValueError as error:
            raise UserError(f"config.axes.prices: {error}") from None

    def identity(self) -> dict[str, str]:
        """What a file that the config names holds, beside model and text: the `prices` of budgets in time."""
        prices = self.prices()
        return {} if prices is None else {"prices": digest(dataclasses.asdict(prices))}

    def space(self, model: LlamaConfig) -> ActionSpace:
        """The joint actions, with costs in `axes.budget_unit` at the middle of an episode."""
        unit, prices = self.axes.budget_unit, self.prices()

        def priced(axis: Axis) -> Axis:
            return in_unit(axis, unit, model, self._usual_keys, prices)

        return ActionSpace(tuple(map(priced, self.axes.build(self.axis_context))))

    @property
    def _usual_keys(self) -> int:
        """Keys in reach at the middle of an episode."""
        return self.episode.prefix_len + self.episode.horizon // 2

    def setup(self, model: LlamaConfig) -> Setup:
        """Everything static about the run; raises `UserError` if the model is too small for its episodes."""
        self.episode.check_context(model.max_position)
        model = dataclasses.replace(model, kernels="xla" if self.mesh.model > 1 else self.kernels)
        rules = EpisodeRules(model, self.space(model), self.episode, self.policy.logit_input)
        one = self.policy.one_budget
        shares = axis_shares(rules.space.axes, one, model, self._usual_keys, self.prices())
        policy = policy_spec(self.policy, rules, self.axes.kappa.page_size, shares)
        return Setup(rules, policy, self.grpo, self.optim, self.memory, self.learner, self.counterfactual)

    def requested(self, space: ActionSpace) -> tuple[tuple[float, ...], ...]:
        """The keep rates of `eval.budgets` as mean costs, in the unit of the axes.

        Of an axis with a single level it is that level's cost, as in training; of axes that a budget leaves
        out at its end, that of the dearest level.
        """

        def cost(axis: Axis, rate: float | None) -> float:
            if len(axis.levels) == 1 or rate is None:
                return float(axis.cost(axis.levels[-1]))
            return float(axis.budget_for(rate))

        return tuple(
            tuple(cost(axis, rate) for axis, rate in itertools.zip_longest(space.axes, rates))
            for rates in self.eval.budgets
        )


def policy_spec(
    config: PolicyConfig, rules: EpisodeRules, page_size: int, shares: tuple[float, ...] = ()
) -> PolicySpec:
    """The policy's network for a model, its actions and episodes; `shares` as `PolicySpec.axis_shares`."""
    space = rules.space
    return PolicySpec(
        hidden_size=rules.model.hidden_size,
        num_actions=space.num_actions,
        horizon=rules.episode.horizon,
        num_axes=len(space.axes),
        config=config,
        level_costs=tuple(tuple(axis.cost(level) for level in axis.levels) for axis in space.axes),
        page_size=page_size,
        axis_shares=shares,
    )


def read_config(workdir: pathlib.Path) -> RunConfig:
    """The config that a training run left in its workdir.  Raises `UserError` if there is none."""
    file = workdir / "config.json"
    try:
        flat = dict(parse_json(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read ({error}); --workdir must be the folder of a training run"
        ) from None
    return RunConfig.from_flat(flat)
