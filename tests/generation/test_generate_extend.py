"""The dense pass over new tokens on top of a cache: in whatever pieces a text is run, it is one prefill."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config

from sol_jax.models import llama

MODEL = llama_config()
CAPACITY = 32


def extended(weights, tokens_N, cuts, cfg, fill=0.0):
    """The hidden states and cache of `tokens_N` run in pieces; the cache has `fill` where nothing is yet."""
    shape = (cfg.num_layers, cfg.num_kv_heads, CAPACITY, cfg.head_size)
    cache = llama.KVCache(*(jnp.full(shape, fill, cfg.dtype) for _ in range(2)))
    hidden = []
    for start, stop in zip([0, *cuts], [*cuts, len(tokens_N)], strict=True):
        part_NxD, entries = llama.extend(weights, tokens_N[start:stop], cache, jnp.int32(start), cfg)
        hidden.append(part_NxD)
        cache = llama.append(cache, entries, jnp.int32(start))
    return jnp.concatenate(hidden), cache


@pytest.mark.parametrize("cuts", [(), (1,), (13,), (5, 6, 20)])
def test_pieces_equal_one_prefill(cuts):
    weights = llama.init_weights(jax.random.key(0), MODEL)
    tokens_N = jax.random.randint(jax.random.key(1), (21,), 0, MODEL.vocab_size)
    hidden_NxD, cache = llama.prefill(weights, tokens_N, MODEL)
    ours_NxD, filled = extended(weights, tokens_N, cuts, MODEL, fill=100.0)
    np.testing.assert_allclose(ours_NxD, hidden_NxD, atol=2e-5)
    for whole, ours in zip(cache, filled, strict=True):
        np.testing.assert_allclose(ours[:, :, :21], whole, atol=2e-5)
        np.testing.assert_array_equal(ours[:, :, 21:], 100.0)


def test_rows_of_several_lengths_in_one_batch():
    """Under vmap each row extends its own prefix at its own position."""
    weights = llama.init_weights(jax.random.key(0), MODEL)
    tokens_BxN = jax.random.randint(jax.random.key(1), (3, 21), 0, MODEL.vocab_size)
    _, cache = jax.vmap(lambda t: llama.prefill(weights, t, MODEL))(tokens_BxN)
    length_B = jnp.array([0, 4, 17])
    new_BxN = jnp.stack([row[n : n + 4] for row, n in zip(tokens_BxN, length_B, strict=True)])

    def one(tokens_N, cache, length):
        hidden, entries = llama.extend(weights, tokens_N, cache, length, MODEL)
        return hidden, llama.append(llama.KVCache(*(part * 0 for part in cache)), entries, length)

    hidden_BxNxD, written = jax.vmap(one)(new_BxN, cache, length_B)
    for b, n in enumerate(length_B):
        whole_SxD, whole = llama.prefill(weights, tokens_BxN[b, : n + 4], MODEL)
        np.testing.assert_allclose(hidden_BxNxD[b], whole_SxD[n:], atol=2e-5)
        np.testing.assert_allclose(written.k[b][:, :, n : n + 4], whole.k[:, :, n:], atol=2e-5)


def test_bfloat16_entries_are_stored_bit_by_bit():
    """`append` takes entries as they are or as a suffix keeps them, and changes none."""
    cfg = dataclasses.replace(MODEL, dtype="bfloat16")
    weights = llama.init_weights(jax.random.key(0), cfg)
    tokens_N = jax.random.randint(jax.random.key(1), (6,), 0, cfg.vocab_size)
    _, whole = llama.prefill(weights, tokens_N, cfg)
    as_bits = jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16), whole)
    for entries in (whole, as_bits):
        blank = llama.KVCache(*(jnp.zeros((2, 2, CAPACITY, 4), cfg.dtype) for _ in range(2)))
        filled = llama.append(blank, entries, jnp.int32(3))
        assert filled.k.dtype == jnp.bfloat16
        np.testing.assert_array_equal(filled.v[:, :, 3:9].astype(jnp.float32), whole.v.astype(jnp.float32))
