"""The options of learning: an episode, the policy, GRPO, the optimizer, and how much runs at once.

Defaults are the paper's (arXiv 2605.10875, appendix B, and its authors' configs); what is not the paper's
says so and is off.
"""

import dataclasses
from typing import Any, Literal, Self

from sol_jax.errors import UserError
from sol_jax.options import Options, option

# What one budget for all axes is a share of, where there is one.
OneBudget = Literal["", "net", "bytes", "operations", "time"]


@dataclasses.dataclass(frozen=True)
class EpisodeConfig(Options):
    """The shape of an episode and of the block of text that it is cut from."""

    where = "config.episode."
    prefix_len: int = option(
        1024, "S: tokens prefilled densely before the first episode of a block", at_least=1
    )
    horizon: int = option(16, "T: decode steps of an episode", at_least=1)
    episodes_per_prefix: int = option(1, "W: episodes of one block, T tokens apart", at_least=1)
    jitter: int = option(
        0,
        "not the paper's: in training the episodes of a block start up to so many tokens earlier, at random",
        at_least=0,
    )
    sinks: int = option(4, "Ts: tokens at the start that recency and relevancy always keep", at_least=0)
    window: int = option(
        2, "Tw: recent tokens likewise; steps with up to Ts + Tw + 1 keys are not controlled", at_least=0
    )

    @property
    def uncontrolled(self) -> int:
        """Steps with at most so many keys take the dense action."""
        return self.sinks + self.window + 1

    @property
    def block_length(self) -> int:
        """Tokens of a block: every episode's tokens and the last label."""
        return self.prefix_len + self.episodes_per_prefix * self.horizon + 1

    def check_context(self, max_position: int) -> None:
        """Raises `UserError` unless episodes fit a model's context."""
        if self.block_length - 1 > max_position:
            raise UserError(
                "config.episode: prefix_len + episodes_per_prefix * horizon = "
                f"{self.block_length - 1} tokens exceed the model's context of {max_position}"
            )
        if self.jitter >= self.prefix_len:
            raise UserError(
                f"config.episode.jitter = {self.jitter} must be less than prefix_len, {self.prefix_len}"
            )


@dataclasses.dataclass(frozen=True)
class PolicyConfig(Options):
    """Sizes of the policy's network and what it is shown."""

    where = "config.policy."
    d_model: int = option(512, "width", at_least=1)
    num_heads: int = option(4, "heads of its attention over the steps of an episode", at_least=1)
    num_layers: int = option(1, "transformer blocks", at_least=1)
    mlp_ratio: float = option(4.0, "width of a block's MLP, in units of d_model", above=0)
    factored_head: bool = option(
        False, "not the paper's: score the levels of each axis and add the scores up, not joint actions"
    )
    normalize_inputs: bool = option(
        False, "not the paper's: LayerNorm on the LLM's hidden states and embeddings"
    )
    page_input: bool = option(False, "not the paper's: show how many keys Quest's newest page holds")
    logit_input: bool = option(
        False, "not the paper's: show the logit that the LLM gave the token which the step reads"
    )
    restate: bool = option(
        False, "not the paper's: ask before each step for what is left of the budget per step"
    )
    restate_steps: int = option(
        1,
        "with restate: steps at least over which what was saved or overspent is made up; with 1 the last "
        "step makes up for all, with more an episode may end off its budget",
        at_least=1,
    )
    predict_losses: bool = option(
        False,
        "not the paper's: predict what each level of each axis loses, and act by loss plus price times cost",
    )
    one_budget: OneBudget = option(
        "",
        "with predict_losses: one budget for all axes, split as the controller likes: the mean keep rate "
        "(net), or the share of a dense step's bytes, operations or time; empty: each axis has its own",
    )

    def check(self) -> None:
        if self.d_model % self.num_heads:
            raise self.wrong("d_model", f"a multiple of policy.num_heads = {self.num_heads}")
        if self.restate_steps > 1 and not self.restate:
            raise self.wrong("restate_steps", "1 where policy.restate is false")
        if self.predict_losses and self.factored_head:
            raise self.wrong("factored_head", "false where policy.predict_losses is true")
        if self.one_budget and not self.predict_losses:
            raise self.wrong("one_budget", "empty where policy.predict_losses is false")

    def asked(self, restate: bool | None, steps: int | None = None, one_budget: str | None = None) -> Self:
        """The same policy, asked otherwise; what is None stays as it is.

        Raises `UserError` for steps where the policy is not asked for what is left, and for one budget where
        it has learned to meet one for each axis.
        """
        restate = self.restate if restate is None else restate
        usual = self.restate_steps if restate else 1
        fields: dict[str, Any] = {"restate": restate, "restate_steps": usual if steps is None else steps}
        if one_budget is not None:
            fields["one_budget"] = one_budget
        return dataclasses.replace(self, **fields)


@dataclasses.dataclass(frozen=True)
class GrpoConfig(Options):
    """What is learned from."""

    where = "config.grpo."
    batch_size: int = option(8, "B: blocks of an update", at_least=1)
    num_schedules: int = option(16, "K: schedules that are compared on the same tokens", at_least=2)
    gamma: float = option(0.85, "discount of the return", at_least=0, at_most=1)
    returns: Literal["sum", "max", "none"] = option(
        "sum", "R_t = r_t + gamma R_{t+1}; max: the larger of the two; none: r_t (the authors' reward_agg)"
    )
    level: Literal["process", "outcome"] = option(
        "process", "compare schedules step by step; outcome: by their sums over an episode"
    )
    norm: Literal["center", "zscore"] = option(
        "center", "take the group's mean off; zscore: also divide by its standard deviation"
    )
    whiten: bool = option(True, "shift and scale the advantages of a batch to mean 0 and deviation 1")
    temperature: float = option(1.3, "of the policy in rollouts and in the loss", above=0)
    clip: float = option(0.2, "epsilon: how far the ratio of probabilities counts", above=0)
    entropy_coef: float = option(0.05, "reward for entropy in the loss", at_least=0)
    dead_zone: float = option(0.02, "budget misses up to this cost nothing", at_least=0)
    penalty_gradient: Literal["sampled", "expected"] = option(
        "sampled",
        "learn from the penalty as part of the return of what was sampled; expected (not the paper's): "
        "through the expected cost of each step under the policy, which leaves returns to likelihood",
    )
    max_price: float = option(
        2.0,
        "with expected penalties the most that a unit of cost is worth, in standard deviations of the "
        "advantages; rewards for acceptance have less noise, and with 4 budgets hold better there",
        above=0,
    )
    quality_weight: float = option(
        1.0, "of the returns beside the penalties; 0 is an ablation that rewards budgets alone", at_least=0
    )
    reward: Literal["likelihood", "acceptance"] = option(
        "likelihood",
        "the label's log-probability; acceptance (not the paper's): the log of the chance that the dense "
        "model keeps a token drawn from the step, for lossless generation",
    )
    sampling: Literal["independent", "stratified"] = option(
        "independent",
        "how the K schedules draw actions; stratified (not the paper's): each with the policy's chances, but "
        "together spread evenly over each axis' levels by these chances, so that luck decides less",
    )
    credit: Literal["action", "axis"] = option(
        "action",
        "what an advantage belongs to; axis (not the paper's): to each axis' level by itself, less what the "
        "costs of the other axes' levels explain; needs policy.factored_head or policy.predict_losses",
    )
    divergence_weight: float = option(
        0.0, "w: share of KL(dense || compressed) in the reward", at_least=0, at_most=1
    )
    reference_kl_coef: float = option(
        0.0, "beta: pull towards the policy that the run started from", at_least=0
    )

    def check(self) -> None:
        if self.penalty_gradient == "expected" and self.norm != "center":
            raise self.wrong("norm", "center where grpo.penalty_gradient is expected")

    @property
    def needs_dense(self) -> bool:
        """Whether rewards compare each step with the dense model."""
        return self.divergence_weight > 0 or self.reward == "acceptance"


@dataclasses.dataclass(frozen=True)
class CounterfactualConfig(Options):
    """What the counterfactual learner learns from; B and K are those of `grpo`.  Not the paper's."""

    where = "config.counterfactual."
    target: Literal["divergence", "label"] = option(
        "divergence", "what a level loses: KL(dense || compressed), or the label's negative log-probability"
    )
    floor: float = option(0.01, "nats added to losses and predictions: less than this is noise", above=0)
    count_after: int = option(
        0,
        "updates after which nothing is learned any more: the policy plays all schedules itself, at random "
        "budgets, and what prices buy is counted on these, so that budgets hold; 0: never",
        at_least=0,
    )
    price_memory: int = option(50, "updates over which the mean cost at each price is averaged", at_least=1)


@dataclasses.dataclass(frozen=True)
class OptimConfig(Options):
    """AdamW and how a batch is cut for it."""

    where = "config.optim."
    learning_rate: float = option(1e-4, "of AdamW", above=0)
    weight_decay: float = option(0.01, "of AdamW", at_least=0)
    clip_norm: float = option(2.0, "global norm that gradients are clipped to", above=0)
    warmup: int = option(0, "optimizer steps of linear warm-up", at_least=0)
    decay_steps: int = option(
        0, "optimizer steps of a cosine decay to 0, warm-up included; 0 keeps the rate constant", at_least=0
    )
    minibatch_steps: int = option(
        512, "decode steps of a minibatch: whole schedules, one at least", at_least=1
    )
    passes: int = option(1, "over the schedules of an update; the paper makes one", at_least=1)
    accumulate: int = option(8, "minibatches of one optimizer step", at_least=1)

    def check(self) -> None:
        if 0 < self.decay_steps <= self.warmup:
            raise self.wrong("decay_steps", f"0, or above optim.warmup = {self.warmup}")


@dataclasses.dataclass(frozen=True)
class MemoryConfig(Options):
    """How much runs at once: this changes memory and speed, never results beyond rounding."""

    where = "config.memory."
    prefill_batch: int = option(
        1, "blocks prefilled at a time: 1 suits a CPU's caches, more fill an accelerator", at_least=1
    )
    head_rows: int = option(256, "hidden states whose vocabulary logits exist at a time", at_least=1)
