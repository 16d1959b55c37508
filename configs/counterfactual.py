"""The counterfactual learner with the full levels: predict what every level loses, then act by price.

    python -m sol_jax.train --config configs/counterfactual.py:cpu --workdir runs/counterfactual

Not the paper's (docs/method.md, "Learning from counterfactuals").  The variants `kappa`, `rho` and `eta` come
first and keep the other axes dense:

    python -m sol_jax.train --config configs/counterfactual.py:rho,cpu --workdir runs/rho
"""

from ml_collections import ConfigDict

from configs import default, sol_j_fl


def get_config(variants: str = "") -> ConfigDict:
    config = sol_j_fl.get_config()
    others = sol_j_fl.alone(config, variants)
    single = others != variants
    config.learner = "counterfactual"
    config.policy.predict_losses = config.policy.normalize_inputs = True
    config.policy.restate = config.policy.page_input = config.policy.logit_input = True
    config.policy.restate_steps = 8
    config.policy.d_model = 128
    config.model.dtype = "bfloat16"
    config.episode.episodes_per_prefix, config.episode.jitter = 4, config.axes.kappa.page_size - 1
    # Many tokens at few levels each tell more than few tokens at every level: 512 an update.
    config.grpo.batch_size, config.grpo.num_schedules = 8, 5 if single else 8
    config.optim.learning_rate, config.optim.accumulate, config.optim.passes = 1e-3, 1, 4
    config.optim.weight_decay = 0.1
    # 80 that learn, and 20 that count what prices buy.
    config.counterfactual.count_after = 80
    config.train.num_updates, config.train.checkpoint_every = 100, 20
    # Over the 80, of 20 or 32 optimizer steps each.
    config.optim.warmup, config.optim.decay_steps = 50, 1600 if single else 2560
    # At the end alone, so that the last update is taken: the score of so few blocks chooses by luck.
    config.eval.every, config.eval.batch_size, config.eval.num_blocks, config.eval.num_random = 0, 8, 16, 2
    return default.vary(config, others)
