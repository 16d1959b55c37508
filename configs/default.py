"""Every field of a run, with the paper's shared settings (arXiv 2605.10875, appendix B).

The other files override a few fields.  All take variants after a colon, joined by commas:

    python -m sol_jax.train --config configs/sol_j_fl.py:cpu,t4 --workdir runs/fl-t4

    smoke   three tiny updates: does everything run?  (seconds after loading the model)
    cpu     prefix of 256 tokens: a training of hours, not days, on two CPU cores
    t4, t16, t64       decode steps of an episode
    fast               learns more in a few hundred updates than the paper's settings
    anywhere           works after prompts of any length, and keeps budgets better
    1b, 3b, 8b         Llama-3.2-1B, Llama-3.2-3B, Llama-3.1-8B-Instruct from the hub, in bfloat16
"""

import math

from ml_collections import ConfigDict


def get_config(variants: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.kernels = "auto"  # of decode steps: by platform and shape; or xla, pallas, triton

    config.model = ConfigDict()
    config.model.path = "smollm2-135m"  # or a folder, a .gguf file, hub:OWNER/NAME
    config.model.dtype = "float32"  # of weights, caches and matmul operands; or bfloat16

    config.data = ConfigDict()
    config.data.source = "wikipedia"  # or globs of .txt/.jsonl/.gz files, tfds:NAME[/CONFIG][:SPLIT]
    config.data.document_start = ""  # regular expression found in the first line of each document
    config.data.validation_fraction = 0.05  # of the documents
    config.data.test_fraction = 0.05
    config.data.cache_dir = ""  # of prepared blocks; empty: ~/.cache/sol_jax

    config.episode = ConfigDict()
    config.episode.prefix_len = 1024  # S
    config.episode.horizon = 16  # T
    config.episode.episodes_per_prefix = 1  # W
    config.episode.jitter = 0  # not the paper's: start up to so many tokens earlier, at random
    config.episode.sinks = 4  # Ts
    config.episode.window = 2  # Tw; steps with up to Ts + Tw + 1 keys are not controlled

    config.axes = ConfigDict()
    config.axes.budget_unit = "nominal"  # what means must meet: keep rates, or the bytes or time behind them
    config.axes.prices = ""  # cost model (JSON, of experiments.benchmarks.roofline) for "time"
    config.axes.kappa = _axis(levels=(0.1, 1.0), budget=(0.1, 1.0), penalty=100.0)
    config.axes.kappa.rule = "quest"  # or recency, relevancy
    config.axes.kappa.page_size = 8  # of quest
    config.axes.kappa.heads = "head"  # of quest: each has its own pages; "group" shares them, another method
    config.axes.kappa.protect = False  # quest: always keep the sinks and the window
    config.axes.rho = _axis(levels=(0.4, 1.0), budget=(0.4, 1.0), penalty=100.0)
    config.axes.eta = _axis(levels=(5, 16), budget=(0.3125, 1.0), penalty=200.0)  # levels in bits

    config.policy = ConfigDict()
    config.policy.d_model = 512
    config.policy.num_heads = 4
    config.policy.num_layers = 1
    config.policy.mlp_ratio = 4.0
    config.policy.factored_head = False  # not the paper's: score the levels of each axis, add up the scores
    config.policy.normalize_inputs = False  # not the paper's: LayerNorm on the LLM's states and embeddings
    config.policy.page_input = False  # not the paper's: see how many keys the newest page holds
    config.policy.restate = False  # not the paper's: ask before each step for what is left of the budget

    config.grpo = ConfigDict()
    config.grpo.batch_size = 8  # B, blocks of an update
    config.grpo.num_schedules = 16  # K
    config.grpo.gamma = 0.85
    config.grpo.returns = "sum"  # or max, none
    config.grpo.level = "process"  # or outcome
    config.grpo.norm = "center"  # or zscore
    config.grpo.whiten = True
    config.grpo.temperature = 1.3
    config.grpo.clip = 0.2
    config.grpo.entropy_coef = 0.05
    config.grpo.dead_zone = 0.02
    config.grpo.penalty_gradient = "sampled"  # or expected (not the paper's): of expected costs
    # Of a unit of expected cost, in standard deviations of the advantages.  Rewards for acceptance have less
    # noise, so that more compute is worth more of these: with 4 budgets hold better there.
    config.grpo.max_price = 2.0
    config.grpo.quality_weight = 1.0  # of the returns; 0: an ablation, only budgets are rewarded
    config.grpo.reward = "likelihood"  # or acceptance (not the paper's): what lossless generation keeps
    config.grpo.divergence_weight = 0.0  # w, share of KL(dense || sparse) in the reward
    config.grpo.reference_kl_coef = 0.0

    config.optim = ConfigDict()
    config.optim.learning_rate = 1e-4
    config.optim.weight_decay = 0.01
    config.optim.clip_norm = 2.0
    config.optim.warmup = 0  # optimizer steps
    config.optim.decay_steps = 0  # cosine decay over so many optimizer steps; 0: constant
    config.optim.minibatch_steps = 512
    config.optim.accumulate = 8  # minibatches of one optimizer step

    config.train = ConfigDict()
    config.train.num_updates = 0  # 0: one pass over the training blocks
    config.train.log_every = 1
    config.train.checkpoint_every = 50
    config.train.keep = 3  # latest checkpoints kept, besides the best one

    config.eval = ConfigDict()
    config.eval.every = 50  # updates; 0: only at the end
    config.eval.num_blocks = 16  # of the validation split, while training
    config.eval.num_test_blocks = 64  # of the test split, at the end; 0: no final evaluation
    config.eval.batch_size = 8
    config.eval.budgets = (
        (0.25, 0.5, 0.4),
        (0.4, 0.6, 0.5),
        (0.55, 0.7, 0.625),
        (0.7, 0.8, 0.75),
        (0.85, 0.9, 0.875),
    )
    config.eval.num_random = 16  # random schedules per block and budget

    config.memory = ConfigDict()
    config.memory.prefill_batch = 1  # blocks prefilled at a time: 1 suits a CPU's caches, more fill a GPU
    config.memory.head_rows = 256  # hidden states whose vocabulary logits exist at a time
    return vary(config, variants)


def _axis(levels: tuple, budget: tuple[float, float], penalty: float) -> ConfigDict:
    axis = ConfigDict()
    axis.levels = levels
    axis.budget = budget  # range of requested mean costs
    axis.budget_choices = ()  # or draw from these
    axis.penalty = penalty  # alpha
    return axis


def vary(config: ConfigDict, variants: str) -> ConfigDict:
    """Applies comma-separated variants, in order; raises on one that does not exist."""
    for name in filter(None, variants.split(",")):
        if name not in VARIANTS:
            raise ValueError(f"unknown config variant {name!r}; there are {', '.join(VARIANTS)}")
        VARIANTS[name](config)
    return config


def _smoke(config: ConfigDict) -> None:
    config.episode.prefix_len, config.episode.horizon = 32, 4
    config.policy.d_model = 32
    config.grpo.batch_size, config.grpo.num_schedules = 2, 4
    config.train.num_updates, config.train.checkpoint_every = 3, 2
    config.eval.every, config.eval.num_blocks, config.eval.num_test_blocks, config.eval.num_random = (
        2,
        2,
        4,
        2,
    )
    config.eval.batch_size = 2


def _cpu(config: ConfigDict) -> None:
    config.episode.prefix_len = 256


def _fast(config: ConfigDict) -> None:
    """Learns more in a few hundred updates on a CPU than the paper's settings do (experiments/results).

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
    config.grpo.batch_size, config.optim.accumulate = 2, 1
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


def _horizon(steps: int):
    def apply(config: ConfigDict) -> None:
        config.episode.horizon = steps

    return apply


def _model(path: str, prefix_len: int = 0):
    def apply(config: ConfigDict) -> None:
        config.model.path, config.model.dtype = path, "bfloat16"
        if prefix_len:  # of the paper's runs with this model
            config.episode.prefix_len = prefix_len
        config.memory.prefill_batch = config.grpo.batch_size

    return apply


VARIANTS = {
    "smoke": _smoke,
    "cpu": _cpu,
    "fast": _fast,
    "anywhere": _anywhere,
    "t4": _horizon(4),
    "t16": _horizon(16),
    "t64": _horizon(64),
    "1b": _model("hub:meta-llama/Llama-3.2-1B"),
    "3b": _model("hub:meta-llama/Llama-3.2-3B", prefix_len=512),
    "8b": _model("hub:meta-llama/Llama-3.1-8B-Instruct"),
}
