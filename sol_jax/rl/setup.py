"""Everything static about a run, in one hashable object."""

import dataclasses
import functools
from typing import Any, Self

from sol_jax.axes.base import ActionSpace
from sol_jax.models.llama import LlamaConfig
from sol_jax.rl.config import (
    CounterfactualConfig,
    EpisodeConfig,
    GrpoConfig,
    MemoryConfig,
    OptimConfig,
)
from sol_jax.rl.policy import Policy, PolicySpec
from sol_jax.rl.rollout import EpisodeRules


@dataclasses.dataclass(frozen=True)
class Setup:
    """All static choices of a run; hashable, so it is a static argument of jitted functions."""

    rules: EpisodeRules
    policy: PolicySpec
    grpo: GrpoConfig = GrpoConfig()
    optim: OptimConfig = OptimConfig()
    memory: MemoryConfig = MemoryConfig()
    learner: str = "grpo"  # or "counterfactual"
    counterfactual: CounterfactualConfig = CounterfactualConfig()

    def __post_init__(self) -> None:
        if self.policy.config.logit_input and not self.rules.shows_logit:
            raise ValueError("the policy looks at the token's logit, and the rules do not show it")

    @property
    def model(self) -> LlamaConfig:
        return self.rules.model

    @property
    def space(self) -> ActionSpace:
        return self.rules.space

    @property
    def episode(self) -> EpisodeConfig:
        return self.rules.episode

    @property
    def needs_dense(self) -> bool:
        """Whether what is learned from compares each step with the dense model."""
        if self.learner == "counterfactual":
            return self.counterfactual.target == "divergence"
        return self.grpo.needs_dense

    def with_rules(self, **fields: Any) -> Self:
        """A copy with some of the rules replaced: `model`, `space`, `episode`."""
        return dataclasses.replace(self, rules=dataclasses.replace(self.rules, **fields))

    @functools.cached_property
    def network(self) -> Policy:
        return Policy(self.policy)
