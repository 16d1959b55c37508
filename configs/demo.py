"""What `make demo` runs: a small policy for SmolLM2-135M on Wikipedia text, in minutes on two CPU cores.

    python -m sol_jax.train --config configs/demo.py --workdir runs/demo

Smaller than the paper's runs wherever that saves time: two levels per axis (8 actions), short prefixes
and episodes, four episodes per prefill; and a ten times higher learning rate with an optimizer step per
minibatch, since there are few updates.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.data.validation_fraction = 0.1
    config.data.test_fraction = 0.2
    config.episode.prefix_len, config.episode.horizon = 128, 8
    config.episode.episodes_per_prefix = 4
    config.policy.d_model = 128
    config.grpo.batch_size, config.grpo.num_schedules = 8, 8
    config.optim.learning_rate, config.optim.accumulate = 1e-3, 1
    config.train.num_updates, config.train.log_every = 40, 10
    config.eval.every = 0
    config.eval.num_test_blocks, config.eval.batch_size, config.eval.num_random = 40, 8, 7
    config.eval.budgets = ((0.4, 0.6, 0.5), (0.6, 0.75, 0.7), (0.8, 0.85, 0.85))
    return default.vary(config, variants)
