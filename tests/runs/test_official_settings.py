"""Configs of the paper's experiments against the table of its authors' official ones, typed anew here."""

import pytest

from configs import horizon, reasoning, single_axis, sol_j_2l, sol_j_3l, sol_j_fl
from sol_jax.runs.config import RunConfig

KAPPA = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
RHO = [0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]
BITS = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
HORIZON = ([0.1, 0.4, 0.7, 1.0], [0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], BITS)
SHARED = {
    "episode.horizon": 16, "episode.prefix_len": 1024, "episode.sinks": 4, "episode.window": 2,
    "episode.episodes_per_prefix": 1, "episode.jitter": 0, "grpo.batch_size": 8, "grpo.num_schedules": 16,
    "grpo.gamma": 0.85, "grpo.returns": "sum", "grpo.level": "process", "grpo.norm": "center",
    "grpo.temperature": 1.3, "grpo.clip": 0.2, "grpo.entropy_coef": 0.05, "grpo.dead_zone": 0.02,
    "grpo.sampling": "independent", "grpo.credit": "action",
    "grpo.divergence_weight": 0.0, "grpo.penalty_gradient": "sampled", "grpo.reference_kl_coef": 0.0,
    "optim.learning_rate": 1e-4, "optim.clip_norm": 2.0, "optim.weight_decay": 0.01, "optim.passes": 1,
    "optim.minibatch_steps": 512, "optim.accumulate": 8, "optim.warmup": 0, "optim.decay_steps": 0,
    "policy.d_model": 512, "policy.num_heads": 4, "policy.num_layers": 1, "policy.mlp_ratio": 4.0,
    "policy.factored_head": False, "policy.normalize_inputs": False, "policy.page_input": False,
    "policy.logit_input": False, "policy.restate": False, "policy.predict_losses": False,
    "learner": "grpo", "model.dtype": "float32",
    "axes.kappa.penalty": 100.0, "axes.rho.penalty": 100.0, "axes.eta.penalty": 200.0,
    "axes.kappa.budget_choices": [], "axes.kappa.protect": False, "axes.kappa.read_newest": False,
    "axes.kappa.dense_layers": 0, "axes.kappa.least_pages": 1, "train.num_updates": 0,
}  # fmt: skip
LLAMA = "hub:meta-llama/Llama-3."


def row(kappa, rho, bits, page, model=f"{LLAMA}2-1B", **more):
    """Fields of one line of the table; budgets go from the lowest level's cost to 1 unless said otherwise."""
    return SHARED | {
        "axes.kappa.levels": kappa, "axes.rho.levels": rho, "axes.eta.levels": bits,
        "axes.kappa.budget": [kappa[0], 1.0], "axes.rho.budget": [rho[0], 1.0],
        "axes.eta.budget": [bits[0] / 16, 1.0], "axes.kappa.page_size": page, "model.path": model,
    } | {name.replace("__", "."): value for name, value in more.items()}  # fmt: skip


FULL = {"kappa": [1.0], "rho": [1.0], "bits": [16], "page": 4}
TABLE = {
    "2L": (sol_j_2l, "1b", row([0.1, 1], [0.6, 1], [5, 16], 4)),
    "3L": (sol_j_3l, "1b", row([0.1, 0.6, 1], [0.4, 0.8, 1], [5, 7, 16], 4)),
    "FL 1B": (sol_j_fl, "1b", row(KAPPA, RHO, BITS, 8, grpo__num_schedules=32)),
    "FL 3B": (sol_j_fl, "3b", row(
        KAPPA, RHO, BITS, 8, f"{LLAMA}2-3B", grpo__num_schedules=32, episode__prefix_len=512,
        grpo__batch_size=4, optim__accumulate=16,
    )),
    "FL 8B": (sol_j_fl, "8b", row(
        KAPPA, RHO, BITS, 8, f"{LLAMA}1-8B-Instruct", grpo__num_schedules=32, episode__prefix_len=512,
        grpo__batch_size=2, optim__accumulate=32,
    )),
    **{f"T = {T}": (horizon, f"1b,t{T}", row(*HORIZON, 8, grpo__num_schedules=32, episode__horizon=T))
       for T in (4, 16, 64)},
    **{f"kappa {low}": (single_axis, f"kappa-{low},1b", row(**FULL | {"kappa": [low, 1.0]}))
       for low in (0.1, 0.2, 0.4)},
    **{f"rho {low}": (single_axis, f"rho-{low},1b", row(**FULL | {"rho": [low, 1.0]}))
       for low in (0.3, 0.4, 0.5)},
    "eta 5 10": (single_axis, "eta-5-10,1b",
                 row(**FULL | {"bits": [5, 10]}, axes__eta__budget=[0.3125, 0.625])),
    "eta 5 16": (single_axis, "eta-5-16,1b", row(**FULL | {"bits": [5, 16]})),
    "eta 6 16": (single_axis, "eta-6-16,1b", row(**FULL | {"bits": [6, 16]})),
    "reasoning": (reasoning, "", row(
        [0.05, *KAPPA], [1.0], [16], 16, "hub:deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        axes__kappa__budget=[0.1, 1.0], episode__sinks=16, episode__window=16, episode__horizon=64,
        grpo__batch_size=2, optim__accumulate=32,
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_config_is_the_official_one(name):
    config, variants, expected = TABLE[name]
    run = RunConfig.from_dict(config.get_config(variants).to_dict())
    flat = run.flat()
    axes = {axis.name: axis for axis in run.axes.build(run.axis_context)}
    for field, value in expected.items():
        if field.endswith(".budget"):  # what is drawn from: of a single level that level's cost
            assert list(axes[field.split(".")[1]].budget) == pytest.approx(value), field
        else:
            assert flat[field] == (pytest.approx(value) if isinstance(value, list) else value), field


def test_every_file_for_an_experiment_of_the_paper_is_held_to_the_table():
    held = {config for config, _, _ in TABLE.values()}
    assert held == {sol_j_2l, sol_j_3l, sol_j_fl, horizon, single_axis, reasoning}
