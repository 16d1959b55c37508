"""Lowering a whole GRPO update: with the axes' kernels for devices that are not here, and for deep models."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.kernel_steps import MODELS
from kernels.lowering import lowers
from sol_jax.axes.base import ActionSpace
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.models import llama
from sol_jax.rl import train_step as update
from sol_jax.rl.config import EpisodeConfig, GrpoConfig
from sol_jax.rl.policy import PolicySpec
from sol_jax.rl.rollout import EpisodeRules
from sol_jax.rl.setup import Setup

SMOLLM2 = MODELS["smollm2-135m"]
AXES = {"page_bounds", "own_page_scores", "select_pages", "norm_prune", "quantize_residual"}


def update_of(cfg, kernels):
    """One update as a function, and its abstract arguments."""
    axes = (
        Quest((0.1, 1.0), (0.1, 1.0), 100.0, kernels=kernels),
        ChannelPruning((0.4, 1.0), (0.4, 1.0), 100.0, kernels=kernels),
        OutputQuantization((5.0, 16.0), (0.3125, 1.0), 200.0, kernels=kernels),
    )
    shape = EpisodeConfig(prefix_len=1024, horizon=16, episodes_per_prefix=2)
    setup = Setup(
        EpisodeRules(dataclasses.replace(cfg, kernels=kernels), ActionSpace(axes), shape),
        PolicySpec(cfg.hidden_size, 8, 16),
        GrpoConfig(num_schedules=16),
    )
    state = jax.eval_shape(lambda: update.init_state(jax.random.key(0), setup))
    tokens = jax.ShapeDtypeStruct((8, setup.episode.block_length), jnp.int32)

    def step(*args):
        return update.train_step(*args, setup)

    return step, (state, llama.abstract_weights(setup.model), tokens)


@pytest.mark.parametrize(
    ("platform", "kernels", "called"),
    [
        ("cuda", "auto", set()),
        ("cuda", "pallas", AXES | {"page_scores", "attend_pages"}),
        ("cuda", "triton", AXES | {"page_scores", "attend_pages"}),  # jax-triton has none for schedules
        ("tpu", "pallas", AXES | {"attend_pages"}),
    ],
)
def test_an_update_lowers_with_its_kernels(platform, kernels, called, jax_triton):
    step, args = update_of(SMOLLM2, kernels)
    lowers(step, *args, platform=platform, kernels=called)


def test_the_program_of_an_update_does_not_grow_with_depth():
    """Layers are scanned, so that a deep model compiles as fast as a shallow one."""
    sizes = []
    for num_layers in (2, 8):
        step, args = update_of(dataclasses.replace(SMOLLM2, num_layers=num_layers), "xla")
        sizes.append(len(jax.jit(step).lower(*args).as_text()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
