"""The frozen Llama and its decode step: dense actions change nothing, compressed ones are seen later."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config

from pallas_kernels.attention import split_attention
from pallas_kernels.causal_attention import CPU_BLOCK, causal_attention
from sol_jax.axes.base import ActionSpace, Axis, held_full
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest, Recency, Relevancy
from sol_jax.axes.rho import ChannelPruning
from sol_jax.models import llama
from sol_jax.models.llama import LlamaConfig
from sol_jax.rl.config import EpisodeConfig, GrpoConfig, OptimConfig, PolicyConfig
from sol_jax.rl.policy import PolicySpec
from sol_jax.rl.rollout import EpisodeRules, Rollout, prefill_block, replay, rollout
from sol_jax.rl.setup import Setup
from sol_jax.rl.train_step import init_state, jit_train_step

CFG = llama_config(vocab_size=61, hidden_size=24, ffn_size=40, head_size=6, tie_embeddings=False)


def random_config(seed: int) -> LlamaConfig:
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.integers(1, 4))
    return dataclasses.replace(
        CFG,
        hidden_size=int(rng.integers(5, 40)),
        ffn_size=int(rng.integers(5, 60)),
        num_layers=int(rng.integers(1, 4)),
        num_heads=kv_heads * int(rng.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_size=2 * int(rng.integers(1, 6)),
        rope_theta=float(10 ** rng.uniform(2, 6)),
        norm_eps=float(10 ** rng.uniform(-6, -3)),
        tie_embeddings=bool(rng.integers(2)),
    )


def axis(kind: type[Axis], *levels: float, **options: Any) -> Axis:
    return kind(levels, (min(levels), max(levels)), penalty=100.0, **options)


# Every way to choose keys at once, for one compilation: at its top level each of them must choose all.
EVERY = ActionSpace(
    (
        *(axis(Quest, 0.2, 1.0, page_size=size) for size in (1, 3, 8)),
        axis(Quest, 0.2, 1.0, page_size=8, protect=True),
        axis(Recency, 0.2, 1.0),
        axis(Relevancy, 0.2, 1.0),
        axis(ChannelPruning, 0.4, 1.0),
        axis(OutputQuantization, 5, 16),
    )
)
# Every step is controlled: each has more keys than the one that it writes.
ONE_EPISODE = EpisodeConfig(prefix_len=21, horizon=5, sinks=0, window=0)


def random_weights(cfg: LlamaConfig, seed: int = 0) -> llama.Weights:
    """Of about the size that keeps activations as they are; gains near 1."""
    rng = np.random.default_rng(seed)

    def draw(spec: llama.ParamSpec) -> jax.Array:
        noise = rng.normal(size=spec.shape)
        return jnp.asarray(spec.stddev * noise if spec.stddev else 1 + 0.2 * noise, cfg.dtype)

    specs = llama.weight_specs(cfg)
    return jax.tree.map(draw, specs, is_leaf=lambda node: isinstance(node, llama.ParamSpec))


def tokens(cfg: LlamaConfig, count: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (count,), 0, cfg.vocab_size)


@functools.partial(jax.jit, static_argnames=("space", "cfg", "shape"))
def play(
    weights: llama.Weights,
    tokens_N: jax.Array,
    action_WxT: jax.Array,
    space: ActionSpace,
    cfg: LlamaConfig,
    shape: EpisodeConfig,
) -> tuple[Rollout, jax.Array]:
    """Given schedules of all episodes of a block, and the dense hidden states [W, T, D]."""
    rules = EpisodeRules(cfg, space, shape)
    block = prefill_block(weights, tokens_N, rules, with_dense=True)

    def one(episode, action_T):
        budget_X = jnp.zeros(len(space.axes))
        return rollout(weights, rules, block.cache, episode, jax.random.key(0), budget_X, replay(action_T))

    return jax.vmap(one)(block.episodes, action_WxT), block.dense_hidden


def assert_same(actual: jax.Array, expected: jax.Array, tolerance: float) -> None:
    """Largest difference over the largest value."""
    error = np.abs(np.asarray(actual) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()
    assert error <= tolerance, error


# --- dense decoding -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "dtype", "tolerance"),
    [(0, "float32", 2e-6), (1, "float32", 2e-6), (2, "bfloat16", 2e-2)],
)
def test_dense_action_equals_plain_forward(seed, dtype, tolerance):
    """Step by step as in one pass; three episodes share a cache that is longer than the prefix of each."""
    cfg = dataclasses.replace(random_config(seed), dtype=dtype)
    shape = dataclasses.replace(ONE_EPISODE, prefix_len=5 + 6 * seed, horizon=7, episodes_per_prefix=3)
    weights = random_weights(cfg, seed)
    dense_WxT = jnp.full((3, 7), EVERY.dense)
    played, reference = play(weights, tokens(cfg, shape.block_length), dense_WxT, EVERY, cfg, shape)
    assert played.hidden.dtype == jnp.float32
    assert_same(played.hidden, reference, tolerance)


def test_each_axis_changes_the_step():
    """From its first cheap step on: the step before is as if nothing were to come."""
    weights, tokens_N = random_weights(CFG), tokens(CFG, ONE_EPISODE.block_length)
    for x, changed in enumerate(EVERY.axes):
        cheap = int(EVERY.join(1 - np.eye(len(EVERY.axes), dtype=int)[x]))
        action_1xT = jnp.full((1, 5), EVERY.dense).at[0, 1].set(cheap)
        played, reference = play(weights, tokens_N, action_1xT, EVERY, CFG, ONE_EPISODE)
        change_T = np.abs(played.hidden - reference).max((0, 2))
        assert change_T[0] < 1e-5
        # The dense steps that follow read the compressed step's keys and values.
        assert (change_T[1:] > 1e-5).all(), f"{changed}: {change_T}"
        assert change_T[1] > 1e-3, f"{changed}: {change_T}"


def test_an_axis_with_the_full_level_alone_is_left_out():
    """Its steps are those of the dense action; nothing of it is in the prefix, the suffix or the program."""
    weights, tokens_N = random_weights(CFG), tokens(CFG, ONE_EPISODE.block_length)
    held = ActionSpace(held_full(EVERY.axes))
    assert (held.num_actions, held.costs_AxX.tolist()) == (1, [[1.0] * len(held.axes)])
    dense_1xT = jnp.full((1, 5), EVERY.dense)
    every, _ = play(weights, tokens_N, dense_1xT, EVERY, CFG, ONE_EPISODE)
    none, _ = play(weights, tokens_N, dense_1xT * 0, held, CFG, ONE_EPISODE)
    assert_same(none.hidden, every.hidden, 2e-6)
    cache = llama.prefill(weights, tokens_N, CFG)[1]
    prefix = llama.index_cache(cache, held.axes).prefix(5)
    assert jax.tree.leaves((prefix.axis_index, llama.empty_suffix(prefix, 3, held.axes).axis_index)) == []
    plain = tuple(Axis(axis.levels, axis.budget, axis.penalty) for axis in held.axes)
    programs = {
        str(jax.make_jaxpr(lambda token, axes=axes: llama.decode_step(
            weights, prefix, llama.empty_suffix(prefix, 3, axes), token, 0, jnp.ones(len(axes)), axes, CFG
        ))(1))
        for axes in (held.axes, plain)
    }  # fmt: skip
    assert len(programs) == 1


# --- parts --------------------------------------------------------------------------------------


def reference_attention(q_Hxd, k_HxNxd, v_HxNxd, keep_HxN):
    """One query of each head over its kept keys, in float64."""
    mixed = []
    for q_d, k_Nxd, v_Nxd, keep_N in zip(q_Hxd, k_HxNxd, v_HxNxd, keep_HxN, strict=True):
        logit = k_Nxd[keep_N].astype(np.float64) @ q_d / np.sqrt(len(q_d))
        weight = np.exp(logit - logit.max())
        mixed.append(weight @ v_Nxd[keep_N] / weight.sum())
    return np.stack(mixed)


@pytest.mark.parametrize("S", [1, 7, CPU_BLOCK - 1, CPU_BLOCK, CPU_BLOCK + 1, 3 * CPU_BLOCK + 5])
def test_causal_attention(S):
    rng = np.random.default_rng(S)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in ((S, 4, 6), (2, S, 6), (2, S, 6)))
    mixed_SxHxd = jax.jit(causal_attention)(q, k, v)
    for position in {0, S // 2, S - 1}:
        seen_HxN = np.tile(np.arange(S) <= position, (4, 1))
        expected = reference_attention(q[position], k.repeat(2, 0), v.repeat(2, 0), seen_HxN)
        np.testing.assert_allclose(mixed_SxHxd[position], expected, atol=2e-6)


def test_split_attention():
    """Two caches as one, over the kept keys alone; either of them may have none."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 2, 6)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 12, 6)).astype(np.float32)
    for keep_N in (rng.random(12) < 0.5, np.arange(12) < 4, np.arange(12) > 9):
        keep = np.broadcast_to(keep_N, (1, 1, 12))
        mixed = split_attention(q, (k[:, :8], v[:, :8]), (k[:, 8:], v[:, 8:]), keep[..., :8], keep[..., 8:])
        whole = [x.repeat(2, 0) for x in (k, v)]
        expected = reference_attention(q.reshape(4, 6), *whole, np.tile(keep_N, (4, 1)))
        np.testing.assert_allclose(mixed.reshape(4, 6), expected, atol=1e-6)


def test_rotation_tells_distances_alone():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, CFG.head_size)).astype(np.float32)

    def logit(q_position, k_position):
        rotated = [
            llama.rotate(x, llama.rope_at(jnp.array(position), CFG))
            for x, position in ((q, q_position), (k, k_position))
        ]
        return float(jnp.vdot(*rotated))

    assert logit(0, 0) == pytest.approx(float(np.vdot(q, k)), abs=1e-6)
    assert logit(9, 2) == pytest.approx(logit(57, 50), abs=1e-5)
    assert logit(9, 2) != pytest.approx(logit(9, 3), abs=1e-2)


def test_logits_of_tied_embeddings():
    weights = random_weights(dataclasses.replace(CFG, tie_embeddings=True))
    hidden_D = jax.random.normal(jax.random.key(1), (CFG.hidden_size,))
    np.testing.assert_allclose(llama.logits(weights, hidden_D), weights["embed"] @ hidden_D, rtol=1e-5)
    assert "lm_head" not in weights


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_logit_of_one_token(tied, dtype):
    weights = random_weights(dataclasses.replace(CFG, tie_embeddings=tied, dtype=dtype))
    hidden_D = jax.random.normal(jax.random.key(1), (CFG.hidden_size,))
    logits_V = llama.logits(weights, hidden_D)
    alone = jax.jit(llama.token_logit)
    found = [alone(weights, hidden_D, jnp.int32(token)) for token in (0, 17, CFG.vocab_size - 1)]
    # In bfloat16 the head rounds the hidden state too.
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(found, logits_V[jnp.array([0, 17, CFG.vocab_size - 1])], tolerance, tolerance)


# --- an axis of one's own -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OutputScaling(Axis):
    """Scales the MLP's output; remembers nothing, chooses no keys."""

    name: str = dataclasses.field(default="scale", init=False)
    effects = frozenset({"mlp_output"})

    def cost(self, level: float) -> float:
        return level**2

    def mlp_output(self, value: jax.Array, y_D: jax.Array) -> jax.Array:
        return value * y_D


def test_fourth_axis_needs_no_change_elsewhere():
    kappa = axis(Quest, 0.2, 1.0, page_size=3)
    space = ActionSpace((kappa, *EVERY.axes[-2:], axis(OutputScaling, 0.5, 1.0)))
    setup = Setup(
        EpisodeRules(CFG, space, EpisodeConfig(prefix_len=9, horizon=4)),
        PolicySpec(CFG.hidden_size, space.num_actions, 4, num_axes=4, config=PolicyConfig(d_model=16)),
        grpo=GrpoConfig(num_schedules=4),
        optim=OptimConfig(learning_rate=1e-2, minibatch_steps=8, accumulate=2),
    )
    weights = random_weights(CFG)
    state = jax.jit(init_state, static_argnames="setup")(jax.random.key(1), setup=setup)
    before = jax.tree.map(np.array, state.params)
    tokens_BxN = tokens(CFG, 2 * setup.episode.block_length).reshape(2, -1)
    state, metrics = jit_train_step(state, weights, tokens_BxN, setup=setup)
    assert {"penalty/scale", "cost/scale", "budget_gap/scale"} <= metrics.keys()
    assert 0.25 < metrics["cost/scale"] < 1
    assert all(np.isfinite(value) for value in jax.tree.leaves(metrics))
    moved = jax.tree.map(lambda old, new: not np.array_equal(old, new), before, state.params)
    assert all(jax.tree.leaves(moved))
