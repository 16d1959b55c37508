"""A whole GRPO update, with the axes' kernels in it, lowers for devices that are not here."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from kernels.lowering import lowers
from sol_jax import llama, update
from sol_jax.axes import ChannelPruning, OutputQuantization, Quest
from sol_jax.axis import ActionSpace
from sol_jax.llama import LlamaConfig
from sol_jax.policy import PolicyConfig
from sol_jax.rollout import EpisodeConfig
from sol_jax.update import GrpoConfig, Setup

SMOLLM2 = LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 8192, 1e5, 1e-5, True, dtype="bfloat16")


@pytest.mark.parametrize(("platform", "kernels"), [("cuda", "auto"), ("tpu", "pallas")])
def test_an_update_lowers_with_its_kernels(platform, kernels):
    axes = (
        Quest((0.1, 1.0), (0.1, 1.0), 100.0, kernels=kernels),
        ChannelPruning((0.4, 1.0), (0.4, 1.0), 100.0, kernels=kernels),
        OutputQuantization((5.0, 16.0), (0.3125, 1.0), 200.0, kernels=kernels),
    )
    setup = Setup(
        dataclasses.replace(SMOLLM2, kernels=kernels),
        ActionSpace(axes),
        EpisodeConfig(prefix_len=1024, horizon=16, episodes_per_prefix=2),
        PolicyConfig(SMOLLM2.hidden_size, 8, 16),
        GrpoConfig(num_schedules=16),
    )
    state = jax.eval_shape(lambda: update.init_state(jax.random.key(0), setup))
    tokens = jax.ShapeDtypeStruct((8, setup.episode.block_length), jnp.int32)

    def step(*args):
        return update.train_step(*args, setup)

    lowers(step, state, llama.abstract_weights(setup.model), tokens, platform=platform)
