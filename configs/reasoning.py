"""The paper's reasoning model: token sparsity only, long episodes, larger pages, sinks and window.

    python -m sol_jax.train --config configs/reasoning.py --workdir runs/reasoning     # a GPU or TPU

Needs hub:deepseek-ai/DeepSeek-R1-Distill-Llama-8B; `--config.model.path` takes any other Llama.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config("t64")
    config.model.path = "hub:deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    config.grpo.batch_size = config.memory.prefill_batch = 2
    config.optim.accumulate = 32
    config.axes.kappa.levels = (0.05, *(k / 10 for k in range(1, 11)))
    config.axes.kappa.budget = (0.1, 1.0)
    config.axes.kappa.page_size = 16
    config.axes.rho.levels = (1.0,)
    config.axes.eta.levels = (16,)
    config.episode.sinks, config.episode.window = 16, 16
    config.eval.budgets = tuple((kappa, 1.0, 1.0) for kappa in (0.1, 0.2, 0.4, 0.6, 0.8))
    return default.vary(config, variants)
