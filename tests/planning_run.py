"""What an update really takes on this machine, for `tests/planning`; runs in a process of its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from small_models import llama_config

from sol_jax.models import llama
from sol_jax.planning.sizes import Shares, sizes
from sol_jax.rl.train_step import init_state, jit_train_step
from sol_jax.runs.config import RunConfig

MODEL = llama_config(
    vocab_size=32768, hidden_size=256, ffn_size=1024, num_layers=8, num_heads=8, num_kv_heads=4, head_size=64,
    max_position=4096,
)  # fmt: skip


def resident(field: str) -> int:
    """Bytes of this process' memory by a field of /proc/self/status: VmRSS now, VmHWM at most."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return 1024 * int(line.split()[1])


def peak_of_an_update(fields: dict[str, Any]) -> tuple[float, float]:
    """Bytes above what the process had before, and what the plan says."""
    config = RunConfig().with_fields({"policy.d_model": 64, "kernels": "xla", **fields})
    setup = config.setup(dataclasses.replace(MODEL, dtype="float32"))
    planned = sizes(Shares(setup, 1, 1, setup.grpo.batch_size), "cpu")
    weights = jax.block_until_ready(llama.init_weights(jax.random.key(0), setup.model))
    tokens = jnp.zeros((setup.grpo.batch_size, setup.episode.block_length), jnp.int32)
    state = init_state(jax.random.key(1), setup)
    state, metrics = jax.block_until_ready(jit_train_step(state, weights, tokens, setup=setup))
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the most so far is from now on
    state, metrics = jax.block_until_ready(jit_train_step(state, weights, tokens, setup=setup))
    del metrics
    return resident("VmHWM") - before, planned.total - planned.weights - planned.state
