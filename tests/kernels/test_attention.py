"""Attention kernels against numpy in float64, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import devices
from kernels.interpreted import compiled, kernel_calls, platforms
from pallas_kernels.attention import (
    LISTED_ROWS,
    attend,
    gpu,
    normalize,
    paged_attention,
    split_attention,
    tpu,
)
from pallas_kernels.dispatch import current_platform, tracing_for
from pallas_kernels.errors import UnavailableError
from pallas_kernels.shapes import distinct
from pallas_kernels.tuning import TABLE

quick = settings(max_examples=20, derandomize=True)
H, G, D, T = 2, 3, 24, 5
RACES = pltpu.InterpretParams(detect_races=True)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def normal(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), dtype)


def by_token(keep, length, page_size: int, S: int) -> np.ndarray:
    return np.repeat(keep, page_size, -1)[..., :S] & (np.arange(S) < length)


def exact(q, keys, values, keep) -> np.ndarray:
    """Softmax attention [H, G, d] in float64 over the kept of [H, N, d] entries; 0 where none is."""
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    logit = np.where(keep, np.einsum("hgd,hnd->hgn", q, keys) * q.shape[-1] ** -0.5, -np.inf)
    top = logit.max(-1, keepdims=True)
    weight = np.exp(logit - np.where(top == -np.inf, 0, top))
    total = weight.sum(-1, keepdims=True)
    return np.einsum("hgn,hnd->hgd", weight, values) / np.where(total == 0, 1, total)


# --- one row ------------------------------------------------------------------------------------


@functools.cache
def attend_on(platform: str, page_size: int):
    def attended(q, prefix, suffix, keep_prefix, keep_suffix, length):
        return attend(q, prefix, suffix, keep_prefix, keep_suffix, length, page_size, implementation="pallas")

    return compiled(attended, platform)


@platforms
@pytest.mark.parametrize(
    ("S", "page_size", "dtype"), [(397, 8, "float32"), (160, 16, "float32"), (160, 8, "bfloat16")]
)
def test_attend(platform, S, page_size, dtype):
    """Any budget per head, any length, a partial last page; pages of nothing, of everything, of one head."""
    P = -(-S // page_size)

    @quick
    @given(st.data())
    def check(data):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
        q, *kv = (normal(rng, H, n, D, dtype=dtype) for n in (G, S, S, T, T))
        share = data.draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]), label="share kept")
        keep = rng.random((H, G, P)) < share * rng.random((H, G, 1)) ** data.draw(st.sampled_from([0, 1]))
        keep_suffix = rng.random((1, 1, T)) < data.draw(st.sampled_from([0.0, 0.7, 1.0]), label="of suffix")
        length = data.draw(st.integers(1, S), label="length")
        got = attend_on(platform, page_size)(
            q, kv[:2], kv[2:], jnp.asarray(keep), jnp.asarray(keep_suffix), jnp.int32(length)
        )
        both = [np.concatenate([a, b], 1) for a, b in zip(kv[:2], kv[2:], strict=True)]
        tokens = np.concatenate(
            [by_token(keep, length, page_size, S), np.broadcast_to(keep_suffix, (H, G, T))], -1
        )
        # Weights are rounded to the values' type as in the reference, so errors are absolute.
        np.testing.assert_allclose(got, exact(q, *both, tokens), rtol=0, atol=TOLERANCE[dtype])
        assert got.dtype == jnp.float32

    check()


@platforms
@pytest.mark.parametrize("shape", distinct("group_size", "head_size"), ids=lambda s: s.name)
def test_named_shapes(platform, shape):
    """Every model's heads, at a short context: a row that reads a list of pages, and six that share all."""
    rng, dtype = np.random.default_rng(0), "float32" if shape.group_size == 3 else "bfloat16"
    S, kv_heads, G, d, page_size = 197, shape.kv_heads, shape.group_size, shape.head_size, shape.page_size
    q, k, v = (normal(rng, *n, kv_heads, m, d, dtype=dtype) for n, m in (((7,), G), ((), S), ((), S)))
    keep = rng.random((7, kv_heads, G, -(-S // page_size))) < 0.4
    keep[..., 0] = True

    def one(q, keep):
        part = paged_attention(q, (k, v), keep, jnp.int32(190), page_size, implementation="pallas")
        return normalize(part)

    def both(q, keep):
        return jnp.concatenate([one(q[0], keep[0])[None], jax.vmap(one)(q[1:], keep[1:])])

    assert G <= LISTED_ROWS
    assert 6 * G > LISTED_ROWS
    for i, got in enumerate(compiled(both, platform)(q, jnp.asarray(keep))):
        expected = exact(q[i], k, v, by_token(keep[i], 190, page_size, S))
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("pages", [16, 32, 100])
@pytest.mark.parametrize("rows", [1, 6])
def test_a_tpu_takes_fewer_pages_where_they_are_large(rows, pages, monkeypatch):
    """Blocks of eight pages, whose masks are read by the 128; the last is not full."""
    page_size, length = 8, 8 * pages - 13
    rng = np.random.default_rng(pages + rows)
    q, k, v = (normal(rng, *n, H, m, D) for n, m in (((rows,), G), ((), 8 * pages), ((), 8 * pages)))
    keep = rng.random((rows, H, G, pages)) < 0.5
    R = rows * G
    assert tpu.block_pages(R, page_size, D, jnp.float32) == tpu.PAGES
    monkeypatch.setattr(tpu, "BLOCK_BYTES", tpu.BLOCK_BYTES // 64)
    assert tpu.block_pages(R, page_size, D, jnp.float32) == 8

    def one(q, keep):
        return normalize(
            paged_attention(q, (k, v), keep, jnp.int32(length), page_size, implementation="pallas")
        )

    for i, got in enumerate(compiled(jax.vmap(one), "tpu")(q, jnp.asarray(keep))):
        expected = exact(q[i], k, v, by_token(keep[i], length, page_size, 8 * pages))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [16, 512])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_fit_a_kernels_memory(rows, dtype):
    """By hand: k and v (two of each, and in float32), and four numbers for each row and token."""
    takes = TABLE["shared_attention", "pallas", "tpu"].takes
    for page_size in takes["page_size"]:
        for d in (64, 128, max(takes["head_size"])):
            tokens = tpu.block_pages(rows, page_size, d, dtype) * page_size
            item = 4 if dtype == "float32" else 2
            assert 2 * tokens * d * (2 * item + 4) + 16 * rows * tokens <= 12 << 20
            assert tokens >= 8


def test_pages_of_one_token():
    """Masks that are not of pages (sinks, a window) are pages of one token."""
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, H, n, D) for n in (G, 50, 50))
    keep = rng.random((H, 1, 50)) < 0.3
    part = compiled(
        lambda keep: paged_attention(q, (k, v), keep, jnp.int32(43), 1, implementation="pallas"), "gpu"
    )(jnp.asarray(keep))
    expected = exact(q, k, v, by_token(keep, 43, 1, 50))
    np.testing.assert_allclose(normalize(part), expected, rtol=0, atol=1e-5)


@platforms
def test_nothing_kept_is_nothing(platform):
    q, kv, own = jnp.ones((H, G, D)), (jnp.ones((H, 40, D)),) * 2, (jnp.ones((H, T, D)),) * 2
    nowhere = jnp.zeros((1, 1, 5), bool)
    part = compiled(
        lambda: paged_attention(q, kv, nowhere, jnp.int32(40), 8, implementation="pallas"), platform
    )()
    assert (part.total == 0).all()
    assert (part.mixed == 0).all()
    assert (part.top == -jnp.inf).all()
    for keep_suffix in (jnp.ones((1, 1, T), bool), jnp.zeros((1, 1, T), bool)):
        got = compiled(
            lambda keep: attend(q, kv, own, nowhere, keep, jnp.int32(40), 8, implementation="pallas"),
            platform,
        )(keep_suffix)
        np.testing.assert_allclose(got, jnp.broadcast_to(keep_suffix[0, 0, 0], got.shape), rtol=1e-6)


@platforms
@pytest.mark.parametrize("spoilt", ["q", "k", "v"])
def test_nan_reaches_the_output(platform, spoilt):
    rng = np.random.default_rng(0)
    x = {"q": normal(rng, H, G, D), "k": normal(rng, H, 40, D), "v": normal(rng, H, 40, D)}
    keep = jnp.zeros((H, G, 5), bool).at[:, :, 2].set(True).at[0, 1, 4].set(True)
    x[spoilt] = x[spoilt].at[0, 1 if spoilt == "q" else 35, 7].set(jnp.nan)  # token 35 is of page 4
    got = compiled(
        lambda q, k, v: paged_attention(q, (k, v), keep, jnp.int32(40), 8, implementation="pallas"), platform
    )(x["q"], x["k"], x["v"])
    nan = np.isnan(normalize(got)).any(-1)
    assert nan[0, 1]
    assert not nan[1].any()
    if spoilt != "v":  # a value that another head of the group keeps counts 0 times NaN, as in the reference
        assert nan.sum() == 1


def test_pages_that_no_head_keeps_are_not_read():
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, H, n, D) for n in (G, 40, 40))
    keep = jnp.asarray(rng.random((H, G, 5)) < 0.3)
    read = np.repeat(keep.any(1), 8, -1)[..., None]
    spoilt = (jnp.where(read, x, jnp.nan) for x in (k, v))
    on_gpu = compiled(
        lambda *kv: paged_attention(q, kv, keep, jnp.int32(40), 8, implementation="pallas"), "gpu"
    )
    for a, b in zip(on_gpu(*spoilt), on_gpu(k, v), strict=True):
        np.testing.assert_array_equal(a, b)


# --- many rows ----------------------------------------------------------------------------------


@platforms
@pytest.mark.parametrize("K", [2, 12])  # 6 query rows a head: a list of pages; 36: every page
def test_rows_share_the_prefix(platform, K):
    """B sequences of W episodes (of their own lengths) of K schedules: one kernel, whose k has no W or K."""
    rng = np.random.default_rng(0)
    B, W, L, S = 2, 2, 2, 77
    q, prefix = normal(rng, B, W, K, H, G, D), (normal(rng, B, L, H, S, D), normal(rng, B, L, H, S, D))
    suffix = normal(rng, B, W, K, H, T, D), normal(rng, B, W, K, H, T, D)
    keep = jnp.asarray(rng.random((B, W, K, H, G, 10)) < 0.4)
    keep_suffix = jnp.asarray(rng.random((B, W, K, 1, 1, T)) < 0.8)
    length = jnp.asarray(rng.integers(1, S + 1, (B, W)), jnp.int32)

    def one(q, prefix, suffix, keep, keep_suffix, length):
        return attend(
            q,
            prefix,
            suffix,
            keep,
            keep_suffix,
            length,
            8,
            layer=jnp.int32(1),
            implementation="pallas",
        )

    over_schedules = jax.vmap(one, in_axes=(0, None, 0, 0, 0, None))
    over_episodes = jax.vmap(over_schedules, in_axes=(0, None, 0, 0, 0, 0))
    batched = jax.vmap(over_episodes)
    args = (q, prefix, suffix, keep, keep_suffix, length)
    got = compiled(batched, platform)(*args)
    for at in np.ndindex(B, W, K):
        kv = [np.concatenate([a[at[0], 1], b[at]], 1) for a, b in zip(prefix, suffix, strict=True)]
        tokens = np.concatenate(
            [by_token(keep[at], length[at[:2]], 8, S), np.broadcast_to(keep_suffix[at], (H, G, T))], -1
        )
        np.testing.assert_allclose(got[at], exact(q[at], *kv, tokens), rtol=0, atol=1e-5)
    operands = kernel_calls(batched, *args, platform=platform)["attend_pages"]
    assert (B, H, W * K * G, D) in operands
    cache = (B, L, H, S, D) if platform == "gpu" or K > 2 else (B, L, H, 10, 8, D)  # TPU lists: by page
    assert operands.count(cache) == 2


def test_many_tiles_of_rows_and_parts_of_keys():
    """130 rows take two tiles and five words of bits; 700 keys are cut among programs."""
    rng = np.random.default_rng(0)
    K, S = 130, 700
    q, keep = normal(rng, K, 1, 1, D), rng.random((K, 1, 1, 88)) < 0.5
    k, v = normal(rng, 1, S, D), normal(rng, 1, S, D)
    args = (q, (k, v), jnp.asarray(keep))

    def one(q, kv, keep):
        return paged_attention(q, kv, keep, jnp.int32(690), 8, implementation="pallas")

    batched = jax.vmap(one, in_axes=(0, None, 0))
    assert kernel_calls(batched, *args)["attend_pages"][-1] == (1, 1, 5, 88)
    got = normalize(compiled(batched, "gpu")(*args))
    for i in range(K):
        expected = exact(q[i], k, v, by_token(keep[i], 690, 8, S))
        np.testing.assert_allclose(got[i], expected, rtol=0, atol=1e-5)


def test_gpu_grids_have_more_axes_than_launches():
    """Triton's lowering packs four axes into three, after which `num_programs` counts something else."""
    q, kv, keep = jnp.zeros((H, G, D)), (jnp.zeros((H, 400, D)),) * 2, jnp.ones((1, 1, 50), bool)
    jaxpr = str(
        jax.make_jaxpr(lambda q: paged_attention(q, kv, keep, jnp.int32(400), 8, implementation="pallas"))(q)
    )
    assert "grid=(1, 4, 2, 1)" in jaxpr
    assert "num_programs" not in jaxpr


def test_a_layer_is_the_same_for_all_rows():
    def one(layer):
        kv = (jnp.zeros((2, H, 16, D)),) * 2
        keep = jnp.ones((1, 1, 2), bool)
        return paged_attention(
            jnp.zeros((H, G, D)), kv, keep, jnp.int32(16), 8, layer=layer, implementation="pallas"
        )

    refusal = r"^paged_attention: a kernel reads one layer for all rows.* or use 'xla' instead"
    with pytest.raises(ValueError, match=refusal):
        jax.vmap(one)(jnp.arange(2))


@pytest.mark.parametrize("P", [40, 5000])  # 5,000 pages are compacted in two blocks
def test_page_lists(P):
    @settings(quick, max_examples=8)
    @given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    def check(seed, share):
        rng = np.random.default_rng(seed)
        bits = np.where(rng.random((2, H, P)) < share, rng.integers(1, 2**16, (2, H, P)), 0).astype(np.int32)
        pages = gpu.list_pages(jnp.asarray(bits), devices.interpreted("gpu"))
        for at in np.ndindex(2, H):
            count, kept = int(pages.count_BxH[at]), np.flatnonzero(bits[at])
            assert count == len(kept)
            np.testing.assert_array_equal(pages.page_BxHxN[at][:count], kept)
            np.testing.assert_array_equal(pages.bits_BxHxN[at][:count], bits[at][kept])

    check()


# --- the XLA form -------------------------------------------------------------------------------


def test_xla_is_split_attention_to_the_bit():
    """Numbers on a CPU do not change: `attend` chooses the same computation on a mask by token.

    A GPU may compile the two to different orders of sums.
    """
    rng = np.random.default_rng(0)
    K, S = 3, 77
    q, suffix = normal(rng, K, H, G, D), (normal(rng, K, H, T, D), normal(rng, K, H, T, D))
    prefix, keep = (normal(rng, 2, H, S, D), normal(rng, 2, H, S, D)), rng.random((K, H, G, 10)) < 0.5
    keep_suffix = jnp.ones((1, 1, T), bool)

    def one(q, suffix, keep):
        length = jnp.int32(70)
        layer = jnp.int32(1)
        return attend(q, prefix, suffix, keep, keep_suffix, length, 8, layer=layer, implementation="xla")

    def before(q, suffix, tokens):
        return split_attention(q, (prefix[0][1], prefix[1][1]), suffix, tokens, keep_suffix)

    got = jax.jit(jax.vmap(one))(q, suffix, jnp.asarray(keep))
    expected = jax.jit(jax.vmap(before))(q, suffix, jnp.asarray(by_token(keep, 70, 8, S)))
    tolerance = 0 if current_platform() == "cpu" else 1e-6
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


def test_parts_by_xla():
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, H, n, D) for n in (G, 40, 40))
    keep = jnp.asarray(rng.random((H, G, 5)) < 0.5).at[0, 0].set(False)
    by_xla, by_kernel = (
        compiled(
            lambda keep, name=name: paged_attention(q, (k, v), keep, jnp.int32(37), 8, implementation=name),
            "gpu",
        )(keep)
        for name in ("xla", "pallas")
    )
    for a, b in zip(by_xla, by_kernel, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- races, errors ------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 6])
def test_tpu_kernels_do_not_race(K, capsys, monkeypatch):
    monkeypatch.setattr(tpu, "PAGES", 16)  # three blocks
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, K, H, G, D), normal(rng, H, 350, D), normal(rng, H, 350, D)
    keep = rng.random((K, H, G, 44)) < 0.6

    def one(q, keep):
        return paged_attention(q, (k, v), keep, jnp.int32(340), 8, implementation="pallas")

    got = normalize(compiled(jax.vmap(one), "tpu", RACES)(q, jnp.asarray(keep)))
    for i in range(K):
        expected = exact(q[i], k, v, by_token(keep[i], 340, 8, 350))
        np.testing.assert_allclose(got[i], expected, rtol=0, atol=1e-5)
    assert "RACE" not in capsys.readouterr().out


def test_a_race_would_be_seen(capsys):
    """What the test above looks for is printed: reading what is still being copied is a race."""

    def kernel(source, out, buffer, copied):
        copy = pltpu.make_async_copy(source, buffer, copied)
        copy.start()
        out[...] = buffer[...]
        copy.wait()

    x, raised = jnp.ones((8, 128)), ""
    run = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=RACES,
    )
    try:
        run(x).block_until_ready()
    except jax.errors.JaxRuntimeError as error:  # since jax 0.12; before, it was printed only
        raised = str(error)
    assert "RACE" in capsys.readouterr().out + raised


def test_what_cannot_run_says_why():
    q, kv, keep = jnp.zeros((H, G, D)), (jnp.zeros((H, 16, D)),) * 2, jnp.ones((1, 1, 2), bool)
    refusal = r"^attend: 'triton' cannot run on this platform \(cpu\) because"
    with tracing_for("cpu"), pytest.raises(UnavailableError, match=refusal):
        attend(q, kv, kv, keep, jnp.ones((1, 1, 16), bool), jnp.int32(16), 8, implementation="triton")
    with pytest.raises(ValueError, match=r"^paged_attention: 2 pages of 4 in the mask, and 4 in the cache"):
        paged_attention(q, kv, keep, jnp.int32(16), 4, implementation="pallas")
    wide = (jnp.zeros((H, 16, 512)),) * 2
    with pytest.raises(
        UnavailableError, match=r"^paged_attention: .* head_size is 512 .*; use 'xla' instead"
    ):
        paged_attention(jnp.zeros((H, G, 512)), wide, keep, jnp.int32(16), 8, implementation="pallas")


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_gradients_are_refused(implementation):
    kv, keep = (jnp.ones((H, 16, D)),) * 2, jnp.ones((1, 1, 2), bool)

    def attended(q):
        keep_suffix = jnp.ones((1, 1, 16), bool)
        return attend(q, kv, kv, keep, keep_suffix, jnp.int32(16), 8, implementation=implementation).sum()

    def part(q):
        return paged_attention(q, kv, keep, jnp.int32(16), 8, implementation=implementation).mixed.sum()

    for name, fn in (("attend", attended), ("paged_attention", part)):
        with pytest.raises(TypeError, match=rf"^{name}: no gradient"):
            jax.grad(fn)(jnp.ones((H, G, D)))
