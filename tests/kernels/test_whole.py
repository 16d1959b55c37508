"""Whole programs through the kernels, interpreted: an update and a text as by XLA, the authors' vectors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attended import attended

from experiments.benchmarks.kernel_steps import MODELS, axes
from kernels.interpreted import compiled
from pallas_kernels.dispatch import current_platform
from pallas_kernels.prune import keep_channels
from pallas_kernels.quantize import fake_quantize
from sol_jax.axes.base import ActionSpace
from sol_jax.axes.kappa import Quest
from sol_jax.generation import episodes as decoding
from sol_jax.generation.episodes import Decoder
from sol_jax.models import llama
from sol_jax.rl import train_step as update
from sol_jax.rl.config import EpisodeConfig, GrpoConfig, MemoryConfig, PolicyConfig
from sol_jax.rl.policy import PolicySpec
from sol_jax.rl.rollout import EpisodeRules
from sol_jax.rl.setup import Setup

# A TPU copies rows of weights in whole lanes.
MODEL = dataclasses.replace(MODELS["tiny"], ffn_size=128, dtype="float32")
HORIZON, PREFIX = 3, 29


def rules_of(kernels: str) -> EpisodeRules:
    model, space = dataclasses.replace(MODEL, kernels=kernels), ActionSpace(axes(kernels, page_size=8))
    return EpisodeRules(model, space, EpisodeConfig(PREFIX, HORIZON))


def random_run(num_tokens: int):
    weights = llama.init_weights(jax.random.key(0), MODEL)
    return weights, jax.random.randint(jax.random.key(1), (1, num_tokens), 0, MODEL.vocab_size)


# --- an update and a text: each on one platform, for the kernels of whole programs take long to compile ---


@pytest.mark.slow
def test_an_update_on_a_gpu_is_that_of_xla():
    """Nine schedules of one sequence, from prefill to the policy's gradient."""
    weights, tokens = random_run(PREFIX + HORIZON + 1)

    def setup_of(kernels: str) -> Setup:
        rules, network = rules_of(kernels), PolicyConfig(d_model=32)
        policy = PolicySpec(MODEL.hidden_size, rules.space.num_actions, HORIZON, config=network)
        grpo, memory = GrpoConfig(num_schedules=9), MemoryConfig(prefill_batch=1)
        return Setup(rules, policy, grpo, memory=memory)

    state = jax.jit(lambda key: update.init_state(key, setup_of("xla")))(jax.random.key(0))

    def step(kernels: str, state, weights, tokens):
        after, metrics = update.train_step(state, weights, tokens, setup_of(kernels))
        return after.opt_state, metrics  # by default an update adds its gradient to others first

    gradient, metrics = compiled(functools.partial(step, "pallas"), "gpu")(state, weights, tokens)
    of_xla = jax.jit(functools.partial(step, "xla"))(state, weights, tokens)
    # On a GPU XLA's own division puts an output in a thousand on the next step of its rounding.
    rtol, atol = (1e-4, 1e-6) if current_platform() == "cpu" else (3e-2, 1e-3)
    for ours, theirs in zip(jax.tree.leaves((gradient, metrics)), jax.tree.leaves(of_xla), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)
    assert sum(float(jnp.abs(leaf).max()) > 1e-4 for leaf in jax.tree.leaves(gradient)) > 20


@pytest.mark.slow
def test_a_text_on_a_tpu_is_that_of_xla():
    """Two episodes of the cheapest action: the same tokens, and hidden states within rounding."""
    weights, tokens = random_run(PREFIX)

    def play(kernels: str, on) -> list[decoding.Played]:
        cfg = Decoder(rules_of(kernels))
        once = on(functools.partial(decoding.play.__wrapped__, cfg=cfg))
        key_B = jax.random.split(jax.random.key(2), 1)
        text_B = decoding.start(weights, tokens, jnp.array([PREFIX]), key_B, PREFIX + 2 * HORIZON, cfg)
        episodes = []
        for _ in range(2):
            text_B, played = once(weights, None, text_B, jnp.ones((1, 3)), jnp.zeros((1, HORIZON), jnp.int32))
            episodes.append(played)
        return episodes

    by_kernels = play("pallas", functools.partial(compiled, platform="tpu"))
    for got, expected in zip(by_kernels, play("xla", jax.jit), strict=True):
        assert (expected.action == 0).all()
        np.testing.assert_array_equal(got.token, expected.token)
        np.testing.assert_allclose(got.seen, expected.seen, rtol=1e-4, atol=1e-5)


# --- the authors' vectors through a TPU's kernels; tests/conformance runs a GPU's -------------------------


def vectors_of(name: str):
    from conformance import golden  # which reads model files, for which a machine of kernels has no packages

    return golden.load(name)


def test_quantised_rows_on_a_tpu():
    vectors = vectors_of("a_fake_quant")
    rows = compiled(functools.partial(fake_quantize, implementation="pallas"), "tpu")
    for bits, expected in (
        *zip(vectors["bits"], vectors["y"], strict=True),
        (vectors["bits_vec"], vectors["y_batched"]),
    ):
        bits_N = np.broadcast_to(np.float32(bits), len(vectors["x"]))
        np.testing.assert_array_equal(rows(vectors["x"], bits_N), expected)


def test_pruned_channels_on_a_tpu():
    vectors = vectors_of("b_channel_prune")
    rows = compiled(functools.partial(keep_channels, implementation="pallas"), "tpu")
    for case in ("d64", "d576", "ties"):
        kept = rows(vectors[f"{case}_x"][:, 0], vectors[f"{case}_keep"])
        np.testing.assert_array_equal(kept, vectors[f"{case}_y"][:, 0])


def test_quest_masks_on_a_tpu():
    """Pages of 8, the smallest that a TPU's kernels take, of which many tie."""
    vectors = vectors_of("c1_quest_mask")
    q_BxHx1xd, k_BxHkvxKxd, budgets = (vectors[f"ties__{name}"] for name in ("q", "k", "budgets"))
    quest = Quest((1.0,), (0.0, 1.0), 1.0, page_size=int(vectors["ties__page"]), kernels="pallas")
    Hkv, K = k_BxHkvxKxd.shape[1:3]
    masks = compiled(functools.partial(attended.__wrapped__, quest), "tpu")
    for q_Hx1xd, k, budget, expected in zip(
        q_BxHx1xd, k_BxHkvxKxd, budgets, vectors["ties__keep"], strict=True
    ):
        # The authors' budgets are in tokens: the middle of the range of kappa that gives this one.
        keep = masks((budget - 0.5) / K, q_Hx1xd.reshape(Hkv, -1, q_Hx1xd.shape[-1]), k, K, K // 2)
        np.testing.assert_array_equal(keep.reshape(expected[:, 0].shape), expected[:, 0])
