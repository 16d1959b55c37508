"""The paper's shared settings (arXiv 2605.10875, appendix B) and the variants that all configs take.

The other files override a few fields.  All take variants after a colon, joined by commas:

    python -m sol_jax.train --config configs/sol_j_fl.py:cpu,t4 --workdir runs/fl-t4

    smoke   three tiny updates: does everything run?  (seconds after loading the model)
    cpu     prefix of 256 tokens: a training of hours, not days, on two CPU cores
    t4, t16, t64       decode steps of an episode
    fast               learns more in a few hundred updates than the paper's settings
    anywhere           works after prompts of any length, and keeps budgets better
    quest              the original Quest's rules: newest page read, two dense layers, three pages at least
    1b, 3b, 8b         Llama-3.2-1B, Llama-3.2-3B, Llama-3.1-8B-Instruct from the hub, with prefix, batch and
                       accumulation of the paper's runs with them, in float32 as there
"""

import math

from ml_collections import ConfigDict

from sol_jax.runs.config import RunConfig


def get_config(variants: str = "") -> ConfigDict:
    """The paper's shared settings, which are the defaults of `sol_jax.runs.config.RunConfig`.

    That class names every field once, with its choices and what it means (docs/configs.md lists them).
    """
    return vary(ConfigDict(RunConfig().to_dict()), variants)


def vary(config: ConfigDict, variants: str) -> ConfigDict:
    """Applies comma-separated variants, in order; raises on one that does not exist."""
    for name in filter(None, variants.split(",")):
        if name not in VARIANTS:
            raise ValueError(f"unknown config variant {name!r}; there are {', '.join(VARIANTS)}")
        VARIANTS[name](config)
    return config


def _smoke(config: ConfigDict) -> None:
    """Three tiny updates: does everything run?"""
    config.episode.prefix_len, config.episode.horizon = 32, 4
    config.policy.d_model = 32
    config.grpo.batch_size, config.grpo.num_schedules = 2, 4
    config.train.num_updates, config.train.checkpoint_every = 3, 2
    config.eval.every, config.eval.batch_size = 2, 2
    config.eval.num_blocks, config.eval.num_test_blocks, config.eval.num_random = 2, 4, 2


def _cpu(config: ConfigDict) -> None:
    """A prefix of 256 tokens: a training of hours, not days, on two CPU cores."""
    config.episode.prefix_len = 256


def _fast(config: ConfigDict) -> None:
    """Learns more in a few hundred updates on a CPU than the paper's settings do (docs/results.md).

    Penalties ten times the paper's make budgets hold where they cost much likelihood.  Learned from through
    expected costs, they leave the comparison of sampled schedules to likelihood, and the smaller discount
    leaves it to the steps near an action.  With two or three levels per axis that gradient drives the policy
    to its ends before it learns to alternate between them, so there penalties stay in the returns, three
    times the paper's.  With two actions in all (`configs/single_axis.py`) it takes a lower rate and a higher
    reward for entropy, or kappa at 0.2 or 1 is down to 0.03 nats of it after 90 updates.
    """
    axes = (config.axes.kappa, config.axes.rho, config.axes.eta)
    single = math.prod(len(axis.levels) for axis in axes) == 2
    few = max(len(axis.levels) for axis in axes) <= 3
    config.model.dtype = "bfloat16"
    config.policy.factored_head = config.policy.normalize_inputs = True
    config.episode.episodes_per_prefix = 4
    config.grpo.batch_size, config.grpo.num_schedules, config.optim.accumulate = 2, 16, 1
    for axis in axes:
        axis.penalty *= 3 if few else 10
    config.grpo.penalty_gradient, config.grpo.gamma = "sampled" if few else "expected", 0.5
    # Four minibatches an update (of 16 steps).
    config.optim.learning_rate = 3e-4 if single else 1e-3
    config.optim.warmup, config.optim.decay_steps = 20, 1200
    if single:
        config.grpo.entropy_coef = 0.2
    config.train.num_updates = 300
    config.eval.batch_size, config.eval.num_blocks, config.eval.num_random = 2, 8, 2


def _anywhere(config: ConfigDict) -> None:
    """Trained on prefixes of whole pages, a policy knows a place in them by the number of the step alone."""
    config.policy.restate = config.policy.page_input = True
    config.episode.jitter = config.axes.kappa.page_size - 1


def _quest(config: ConfigDict) -> None:
    """The original Quest's rules (arXiv 2406.10774), which the authors' code leaves out (docs/method.md)."""
    config.axes.kappa.read_newest = True
    config.axes.kappa.dense_layers, config.axes.kappa.least_pages = 2, 3


def _horizon(steps: int):
    def apply(config: ConfigDict) -> None:
        config.episode.horizon = steps

    apply.__doc__ = f"{steps} decode steps of an episode."
    return apply


def _model(path: str, prefix_len: int = 1024, batch_size: int = 8, accumulate: int = 8):
    """With the prefix, batch and accumulation of the paper's runs with this model."""

    def apply(config: ConfigDict) -> None:
        config.model.path, config.episode.prefix_len = path, prefix_len
        config.grpo.batch_size, config.optim.accumulate = batch_size, accumulate
        config.memory.prefill_batch = batch_size

    apply.__doc__ = f"{path.removeprefix('hub:')} from the hub."
    return apply


VARIANTS = {
    "smoke": _smoke,
    "cpu": _cpu,
    "fast": _fast,
    "anywhere": _anywhere,
    "quest": _quest,
    "t4": _horizon(4),
    "t16": _horizon(16),
    "t64": _horizon(64),
    "1b": _model("hub:meta-llama/Llama-3.2-1B"),
    "3b": _model("hub:meta-llama/Llama-3.2-3B", prefix_len=512, batch_size=4, accumulate=16),
    "8b": _model("hub:meta-llama/Llama-3.1-8B-Instruct", prefix_len=512, batch_size=2, accumulate=32),
}
