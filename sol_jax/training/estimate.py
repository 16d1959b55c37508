"""How long a run will take: its operations over half of a matrix product's rate, measured now."""

import dataclasses
import math

from sol_jax.costs.update import matmul_rate, update_flops
from sol_jax.evaluation.options import EvaluateOptions
from sol_jax.rl.config import GrpoConfig
from sol_jax.rl.setup import Setup
from sol_jax.runs.config import RunConfig
from sol_jax.text.blocks import Blocks

# Of the rate of a large matrix product: what updates and evaluations of SmolLM2-135M reach on a CPU.  On an
# accelerator a policy and a model this small reach less, and the estimate is a lower bound.
SHARE = 0.5


def evaluation_flops(setup: Setup, num_blocks: int, num_entries: int) -> float:
    """Operations of `num_entries` schedules of every episode of some blocks, each block prefilled once."""
    grpo = dataclasses.replace(GrpoConfig(), num_schedules=num_entries)
    each = update_flops(dataclasses.replace(setup, grpo=grpo), num_blocks)
    return each["prefill"] + each["rollout"] + each["head"]


def entries_of(options: EvaluateOptions, config: RunConfig, setup: Setup) -> int:
    """Schedules of every episode that an evaluation runs."""
    plan = options.plan(config, setup)
    matched = len([name for name in plan.controllers if name != "random"])
    per_hold = len(plan.budgets) * (1 + matched) + len(plan.drawn) * plan.num_random
    return 1 + per_hold * len(plan.holds)


def updates_of(config: RunConfig, blocks: Blocks) -> int:
    """How many updates a run makes."""
    return config.train.num_updates or len(blocks) // config.grpo.batch_size


def estimated_seconds(
    config: RunConfig, setup: Setup, updates: int, options: EvaluateOptions | None = None
) -> dict[str, float]:
    """Seconds of so many updates with their validations, and of the evaluation that `options` asks for."""
    rate = SHARE * matmul_rate(setup.model.dtype)
    update = sum(update_flops(setup, config.grpo.batch_size).values())
    own = EvaluateOptions()
    validations = updates // config.eval.every if config.eval.every else 0
    validation = evaluation_flops(setup, config.eval.num_blocks, entries_of(own, config, setup))
    options = options or own
    blocks = options.num_blocks or config.eval.num_test_blocks
    test = evaluation_flops(setup, blocks, entries_of(options, config, setup))
    return {"training": (updates * update + validations * validation) / rate, "evaluation": test / rate}


def clock(seconds: float) -> str:
    """Seconds as people say them."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
