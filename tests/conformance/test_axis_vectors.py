"""Quantisation, pruning and the choice of keys against the authors' functions: bit for bit."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attended import attended

from pallas_kernels.prune import keep_channels
from pallas_kernels.quantize import fake_quantize
from pallas_kernels.topk import at_least_kth
from sol_jax.axes.base import Axis
from sol_jax.axes.kappa import Quest, Recency, Relevancy
from sol_jax.axes.key_selection import float32_ceil

# --- a: quantisation ----------------------------------------------------------------------------


def _row_by_row(x, bits):
    return jax.lax.map(lambda row: fake_quantize(*row), (x, bits))


_with_constant = jax.jit(lambda x, bits: fake_quantize(x, jnp.float32(bits)), static_argnums=1)

# XLA rewrites divisions differently in each of these; the result may not depend on it.
_WAYS = {
    "op by op": fake_quantize,
    "jit": jax.jit(fake_quantize),
    "jit vmap": jax.jit(jax.vmap(fake_quantize)),
    "jit scan": jax.jit(_row_by_row),
    "jit constant": lambda x, bits: _with_constant(x, float(bits.flat[0])),
    "pallas": jax.jit(functools.partial(fake_quantize, implementation="pallas")),
}


def _quantized(way: str, x, bits, dtype=jnp.float32):
    rows_NxD = jnp.asarray(x, dtype).reshape(-1, x.shape[-1])
    bits_N = np.broadcast_to(np.asarray(bits, np.float32), len(rows_NxD))
    return np.asarray(_WAYS[way](rows_NxD, bits_N).astype(jnp.float32)).reshape(x.shape)


@pytest.mark.parametrize("way", _WAYS)
def test_quantised_rows(way):
    vectors = golden.load("a_fake_quant")
    for i, bits in enumerate(vectors["bits"]):
        for x, y in (("x", "y"), ("x3", "y3")):
            _assert_equal(_quantized(way, vectors[x], bits), vectors[y][i], f"{y}, {bits} bits")
        bfloat16 = _quantized(way, vectors["x_bf16_as_f32"], bits, jnp.bfloat16)
        _assert_equal(bfloat16, vectors["y_bf16_as_f32"][i], f"bfloat16, {bits} bits")
    if way != "jit constant":
        _assert_equal(_quantized(way, vectors["x"], vectors["bits_vec"]), vectors["y_batched"], "mixed bits")
    _assert_equal(_quantized(way, vectors["x"], 5), vectors["y_batched_scalar5"], "5 bits for all rows")


def _assert_equal(actual, expected, what: str) -> None:
    np.testing.assert_array_equal(actual, expected, err_msg=f"{what}: departs from the authors'", strict=True)


# --- b: pruning ---------------------------------------------------------------------------------


def test_pruned_channels():
    """Ours sees one token at a time: where a case has several, the authors' one mask for all of them is ours
    for the channels' largest magnitudes."""
    vectors = golden.load("b_channel_prune")
    cases = [name.removesuffix("_x") for name in vectors if name.endswith("_x")]
    assert len(cases) > 1
    for case in cases:
        x_BxTxD = vectors[f"{case}_x"]
        keep_B = np.broadcast_to(vectors[f"{case}_keep"], len(x_BxTxD))
        kernel = functools.partial(keep_channels, implementation="pallas")
        for prune in (keep_channels, jax.jit(jax.vmap(keep_channels)), jax.jit(kernel)):
            if x_BxTxD.shape[1] == 1:
                y_BxTxD = np.asarray(prune(x_BxTxD[:, 0], keep_B))[:, None]
            else:
                y_BxTxD = x_BxTxD * (np.asarray(prune(np.abs(x_BxTxD).max(1), keep_B)) > 0)[:, None]
            _assert_equal(y_BxTxD, vectors[f"{case}_y"], case)
            if f"{case}_n_kept" in vectors:
                num_B = (y_BxTxD != 0).any(1).sum(-1)
                _assert_equal(num_B, vectors[f"{case}_n_kept"], f"{case}: channels kept")


def test_number_of_channels():
    vectors = golden.load("b_channel_prune")
    prune = jax.jit(jax.vmap(keep_channels, (None, 0)))
    for D, expected in zip(vectors["table_D"], vectors["table_k"], strict=True):
        distinct_D = jnp.arange(1.0, D + 1)
        kept = np.asarray(prune(distinct_D, vectors["table_keep"]) > 0).sum(-1)
        _assert_equal(kept, expected, f"channels kept of {D}")


# --- c1: Quest ----------------------------------------------------------------------------------


def _axis(kind: type[Axis], **options) -> Axis:
    return kind(levels=(1.0,), budget=(0.0, 1.0), penalty=1.0, **options)


def _prefix_lengths(num_keys: int, page: int) -> set[int]:
    """Where to end the prefix: in the middle of a page and at its ends, early, late."""
    whole = num_keys // page * page
    return {n for n in (1, page - 1, page, num_keys // 2, whole - 1, whole, num_keys - 1) if 0 < n < num_keys}


def _masks(axis, value_B, q_BxHxd, k_BxHkvxKxd, prefix_len: int, capacity: int):
    """[B, H, K] from the authors' layout; `capacity` keys fit, so that one program serves many cases."""
    H, (Hkv, K) = q_BxHxd.shape[1], k_BxHkvxKxd.shape[1:3]
    unused = ((0, 0), (0, capacity - K), (0, 0))

    def row(value, q_Hxd, k_HkvxKxd):
        q_HkvxGxd = q_Hxd.reshape(Hkv, H // Hkv, -1)
        return attended(axis, np.float32(value), q_HkvxGxd, np.pad(k_HkvxKxd, unused), K, prefix_len)

    rows = [row(*of_row) for of_row in zip(value_B, q_BxHxd, k_BxHkvxKxd, strict=True)]
    return np.stack(rows).reshape(len(rows), H, capacity)[..., :K]


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
def test_quest_masks(kernels):
    """Wherever the prefix ends, the same keys are kept."""
    vectors = golden.load("c1_quest_mask")
    capacity = max(vectors[f"{case}__k"].shape[2] for case in vectors["cases"])
    assert len(vectors["cases"])
    for case in vectors["cases"]:
        q_BxHxQxd, k_BxHkvxKxd, budgets, page = (
            vectors[f"{case}__{name}"] for name in ("q", "k", "budgets", "page")
        )
        B, H, Q, _ = q_BxHxQxd.shape
        K = k_BxHkvxKxd.shape[2]
        # One budget counts for all rows, surplus ones for none.
        budget_B = np.broadcast_to(budgets, B) if budgets.size == 1 else budgets[:B]
        # The authors' budgets are in tokens: the middle of the range of kappa that gives this one.
        kappa_B = np.maximum(budget_B - 0.5, 0) / K
        quest = _axis(Quest, page_size=int(page), kernels=kernels)
        expected = vectors.get(f"{case}__keep", np.ones((B, H, Q, K), bool))
        assert (f"{case}__keep" in vectors) != vectors[f"{case}__is_none"]
        for prefix_len in _prefix_lengths(K, int(page)):
            for query in range(Q):
                keep = _masks(quest, kappa_B, q_BxHxQxd[:, :, query], k_BxHkvxKxd, prefix_len, capacity)
                if f"{case}__allowed" in vectors:
                    # Several queries at once, as in a prefill: theirs bounds the pages by later keys too.
                    keep &= vectors[f"{case}__allowed"][:, :, query]
                what = f"{case}, query {query}, prefix of {prefix_len}"
                _assert_equal(keep, expected[:, :, query], what)


# --- c2: budgets, recency, relevancy ------------------------------------------------------------


def test_token_budgets():
    vectors = golden.load("c2_other_masks")
    keep, kv_len = vectors["budget_keep"], vectors["budget_kvlen"].astype(np.int32)
    budget = np.minimum(jax.jit(float32_ceil)(keep[:, None], kv_len), kv_len)
    _assert_equal(budget, vectors["budget_table"].astype(np.int32), "token budgets")


def _sinks_and_window(name: str) -> tuple[int, int]:
    sinks, window = name.removeprefix("recency_Ts").removesuffix("__mask").split("_Tw")
    return int(sinks), int(window)


def test_recency_masks():
    vectors = golden.load("c2_other_masks")
    names = [name for name in vectors if name.endswith("__mask")]
    assert names
    for name in names:
        sinks, window = _sinks_and_window(name)
        recency, expected = _axis(Recency, sinks=sinks, window=window), vectors[name]
        _assert_equal(vectors[name.replace("mask", "bias_eq0")][:, 0, 0], expected, "additive form")
        query, key = np.zeros((1, 1, 2)), np.zeros((1, expected.shape[1], 2))
        rows = zip(vectors["recency_lens"], vectors["recency_keep"], expected, strict=True)
        for num_keys, keep, mask in rows:
            for prefix_len in _prefix_lengths(num_keys, 8):
                ours = attended(recency, keep, query, key, int(num_keys), prefix_len)
                what = f"{name}: {num_keys} keys, prefix of {prefix_len}"
                _assert_equal(np.asarray(ours)[0, 0], mask, what)


def test_relevancy_masks():
    vectors = golden.load("c2_other_masks")
    capacity = max(vectors[f"rel_{case}__k"].shape[2] for case in vectors["rel_cases"])
    assert len(vectors["rel_cases"])
    for case in vectors["rel_cases"]:
        q, k, keep, (sinks, window), expected = (
            vectors[f"rel_{case}__{name}"] for name in ("q", "k", "keepfrac", "TsTw", "keep")
        )
        relevancy = _axis(Relevancy, sinks=int(sinks), window=int(window))
        for prefix_len in _prefix_lengths(k.shape[2], 8):
            ours = _masks(relevancy, keep, q[:, :, 0], k, prefix_len, capacity)
            _assert_equal(ours, expected[:, :, 0], f"{case}, prefix of {prefix_len}")


def test_relevancy_by_probability():
    """The authors' helper that nothing of theirs calls, and so is not ported: our threshold on its inputs."""
    vectors = golden.load("c2_other_masks")
    probs_BxHxQxK = vectors["relmask_probs"]
    count_B = float32_ceil(vectors["relmask_keep"], probs_BxHxQxK.shape[-1])
    count = np.broadcast_to(np.asarray(count_B)[:, None, None], probs_BxHxQxK.shape[:-1])
    _assert_equal(np.asarray(at_least_kth(probs_BxHxQxK, count)), vectors["relmask_per_head"], "per head")
    mean = np.broadcast_to(probs_BxHxQxK.mean(1, keepdims=True), probs_BxHxQxK.shape)
    _assert_equal(np.asarray(at_least_kth(mean, count)), vectors["relmask_per_layer"], "per layer")
