"""Floating-point operations of an update, and the rate that this machine's large matrix products reach."""

import functools
import time

import jax
import jax.numpy as jnp
from jax import lax

from sol_jax.models.llama import LlamaConfig
from sol_jax.rl.policy import PolicySpec
from sol_jax.rl.setup import Setup


def layer_weights(cfg: LlamaConfig) -> int:
    """Weights that every token is multiplied with, all decoder layers together."""
    attention = cfg.hidden_size * cfg.head_size * 2 * (cfg.num_heads + cfg.num_kv_heads)
    return cfg.num_layers * (attention + 3 * cfg.hidden_size * cfg.ffn_size)


def policy_weights(spec: PolicySpec) -> int:
    """Weights of the policy's matrices (embeddings, which are looked up, and biases left out)."""
    cfg = spec.config
    inputs = spec.hidden_size + spec.embed_size + spec.scalar_embed_size + spec.action_embed_size
    block = (4 + 2 * cfg.mlp_ratio) * cfg.d_model**2
    heads = cfg.d_model * spec.num_scores
    if not cfg.predict_losses:  # the direct head from the targets
        heads += spec.budget_embed_size * (spec.num_axes + spec.num_scores)
    scalars = spec.num_scalars * spec.scalar_embed_size
    return int(inputs * cfg.d_model + cfg.num_layers * block + heads + scalars)


def update_flops(setup: Setup, batch_size: int) -> dict[str, float]:
    """Operations of one `train_step` by stage; a multiplication and an addition count as two.

    Counts what the method needs: causal prefill attention over the keys before each query, decode
    attention over all keys in reach (a mask saves nothing), no recomputation, no padding.
    """
    cfg, shape, K = setup.model, setup.episode, setup.grpo.num_schedules
    S, T, W, B = shape.prefix_len, shape.horizon, shape.episodes_per_prefix, batch_size
    with_reference, w = setup.needs_dense, setup.grpo.divergence_weight
    per_key = 4 * cfg.num_layers * cfg.num_heads * cfg.head_size  # q.k and weight.v
    matrices = 2 * layer_weights(cfg)
    M = S + (W - 1 + with_reference) * T
    decoded = B * W * K * T
    mean_keys = S + (W - 1) * T / 2 + (T + 1) / 2
    # Logits of the compressed step alone, and of it and the dense one for whatever compares the two.
    likelihood = 0 if w == 1 else 2 if setup.grpo.reward == "acceptance" else 1
    heads = likelihood + 2 * (w > 0)
    if setup.learner == "counterfactual":
        heads = 1 + with_reference
    return {
        "prefill": float(B * (M * matrices + per_key * M * (M + 1) / 2)),
        "rollout": float(decoded * (matrices + per_key * mean_keys)),
        "head": float(decoded * 2 * cfg.vocab_size * cfg.hidden_size * heads),
        "policy": float(decoded * 2 * policy_weights(setup.policy) * 4),  # a step, then forward and backward
    }


@functools.cache
def matmul_rate(dtype: str, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of a large square product with operands of `dtype` and float32 accumulation; best of several."""
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda a: lax.dot(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
