"""Pruning kernels against a plain loop and the XLA reference, interpreted, and lowered for devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels import devices
from kernels.lowering import lowers
from pallas_kernels import prune
from pallas_kernels.prune import gpu, tpu
from pallas_kernels.shapes import distinct

quick = settings(max_examples=25, derandomize=True)
kernels = devices.either(gpu, tpu)
EPS = 1e-5


@functools.cache
def keep(kernels, interpret=None):
    return jax.jit(
        functools.partial(kernels.keep_channels, interpret=interpret or devices.interpret(kernels))
    )


@functools.cache
def norm(kernels, interpret=None):
    return jax.jit(lambda *args: kernels.norm_prune(*args, EPS, interpret or devices.interpret(kernels)))


def draw_rows(data, N: int, D: int) -> np.ndarray:
    """Rows with ties, neighbouring numbers, zeros of both signs, and now and then NaN or infinity."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    largest = data.draw(st.sampled_from([2, 20, 10**6]), label="largest")  # few values: many ties
    x = (rng.integers(-largest, largest + 1, (N, D)) / 8).astype(np.float32)
    x = np.where(rng.random((N, D)) < 0.1, np.nextafter(x, 2 * x), x)
    x[x == 0] *= rng.choice([1.0, -1.0], (x == 0).sum())
    for odd in data.draw(
        st.lists(st.sampled_from([np.nan, -np.nan, np.inf, -np.inf]), max_size=3), label="odd"
    ):
        x[rng.integers(N), rng.integers(D)] = odd
    if data.draw(st.booleans(), label="a row of zeros"):
        x[rng.integers(N)] = 0
    return x


def kept_by_loop(x_D: np.ndarray, count: int) -> np.ndarray:
    size = [(True, 0.0) if math.isnan(x) else (False, abs(x)) for x in x_D.tolist()]  # NaN is the largest
    threshold = sorted(size)[-count]
    return np.array([entry >= threshold for entry in size])


fractions = st.sampled_from([0.0, 0.1, 0.4, 0.45, 0.95, 1.0]) | st.floats(0, 1, width=32)


def draw_counts(data, N: int, D: int) -> np.ndarray:
    kept = data.draw(st.lists(fractions, min_size=N, max_size=N), label="keep")
    return np.array([min(max(math.ceil(np.float32(f) * np.float32(D)), 1), D) for f in kept], np.int32)


@kernels
@pytest.mark.parametrize(("N", "D"), [(1, 576), (9, 37), (8, 1), (3, 128)])
def test_keep_channels(kernels, N, D):
    @quick
    @given(st.data())
    def check(data):
        x, count = draw_rows(data, N, D), draw_counts(data, N, D)
        expected = [np.where(kept_by_loop(*row), row[0], 0) for row in zip(x, count, strict=True)]
        np.testing.assert_array_equal(keep(kernels)(x, count), expected)

    check()


@kernels
@pytest.mark.parametrize(("N", "D"), [(1, 576), (9, 37), (2, 256)])
def test_norm_prune(kernels, N, D):
    """The kept set of the kernel's own numbers is exact; the numbers are those of float64 within rounding."""

    @quick
    @given(st.data())
    def check(data):
        x, count = draw_rows(data, N, D), draw_counts(data, N, D)
        gain = np.random.default_rng(0).uniform(0.5, 2, D).astype(np.float32)
        whole = norm(kernels)(x, np.full(N, D, np.int32), gain)[0]
        wide = x.astype(np.float64)
        with np.errstate(invalid="ignore"):
            exact = wide / np.sqrt((wide**2).mean(1, keepdims=True) + EPS) * gain
        np.testing.assert_allclose(whole, exact, rtol=1e-5, atol=1e-7)
        pruned, channels, num_kept = norm(kernels)(x, count, gain)
        for i in range(N):
            kept = kept_by_loop(np.asarray(whole[i]), count[i])
            np.testing.assert_array_equal(pruned[i], np.where(kept, whole[i], 0))
            assert num_kept[i] == kept.sum()
            np.testing.assert_array_equal(channels[i], [*np.flatnonzero(kept), *np.flatnonzero(~kept)])

    check()


@pytest.mark.parametrize(("N", "D"), [(1, 576), (3, 37)])
def test_compact(N, D):
    compact = jax.jit(functools.partial(gpu.compact, interpret=devices.interpreted("gpu")))

    @quick
    @given(st.data())
    def check(data):
        x = draw_rows(data, N, D)
        x[:, ::2] = 0
        channels, count = compact(x)
        there = (np.isnan(x) | (x != 0)).any(0)
        assert count[0] == there.sum()
        np.testing.assert_array_equal(channels[0], [*np.flatnonzero(there), *np.flatnonzero(~there)])

    check()


@pytest.mark.parametrize("N", [1, 3, 9])
def test_rows_of_vmaps_are_those_of_a_loop(N):
    rng = np.random.default_rng(N)
    x, fraction = rng.normal(size=(N, 40)).astype(np.float32), rng.random(N, np.float32)
    gain = jnp.asarray(rng.normal(size=40), jnp.bfloat16)

    def both(name):
        def one(x_D, fraction):
            return prune.keep_channels(x_D, fraction, name), prune.norm_prune(x_D, gain, EPS, fraction, name)

        return one

    kept, pruned = jax.jit(jax.vmap(both("pallas")))(x, fraction)
    one = jax.jit(both("xla"))
    loop = [one(*row) for row in zip(x, fraction, strict=True)]
    np.testing.assert_array_equal(kept, [row[0] for row in loop])
    np.testing.assert_allclose(pruned.x_D, [row[1].x_D for row in loop], rtol=1e-6)
    np.testing.assert_array_equal(pruned.channels_D, [row[1].channels_D for row in loop])
    np.testing.assert_array_equal(pruned.num_kept, [row[1].num_kept for row in loop])


def test_leading_axes():
    x = np.random.default_rng(0).normal(size=(2, 3, 40)).astype(np.float32)
    for fraction in (0.3, np.float32([0.1, 0.5, 1.0]), np.full((2, 3), 0.7, np.float32)):
        each = np.broadcast_to(np.float32(fraction), (2, 3))
        kept = prune.keep_channels(x, fraction, "pallas")
        np.testing.assert_array_equal(kept, prune.keep_channels(x, each, "xla"))


def test_bfloat16_stays_bfloat16():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 37)), jnp.bfloat16)
    expected = prune.keep_channels(x, jnp.full(9, 0.5), "xla")
    for kernels in (gpu, tpu):
        out = keep(kernels)(x, np.full(9, 19, np.int32))
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(out, expected)


def test_tpu_kernels_do_not_race(capsys):
    rng = np.random.default_rng(0)
    x, count = rng.normal(size=(9, 130)).astype(np.float32), rng.integers(1, 131, 9).astype(np.int32)
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    np.testing.assert_array_equal(keep(tpu, params)(x, count), keep(gpu)(x, count))
    got, expected = (f(x, count, np.ones(130, np.float32)) for f in (norm(tpu, params), norm(gpu)))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    np.testing.assert_array_equal(got[1], expected[1])
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("op", ["keep_channels", "norm_prune"])
def test_gradients_are_refused(op, implementation):
    x, gain = jnp.arange(1.0, 9.0), jnp.ones(8)
    fn = {
        "keep_channels": lambda x: prune.keep_channels(x, 0.5, implementation),
        "norm_prune": lambda x: prune.norm_prune(x, gain, EPS, 0.5, implementation).x_D,
    }[op]
    with pytest.raises(TypeError, match=f"^{op}: no gradient"):
        jax.grad(lambda x: jnp.sum(fn(x)))(x)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("shape", distinct("hidden", "batch"), ids=lambda s: f"{s.name}-{s.batch}")
def test_lowering(shape, platform):
    rows = jax.ShapeDtypeStruct((shape.batch, shape.hidden), jnp.float32)
    fraction = jax.ShapeDtypeStruct((shape.batch,), jnp.float32)
    gain = jax.ShapeDtypeStruct((shape.hidden,), jnp.bfloat16)

    def pruned(x_NxD, fraction_N, gain_D):
        return jax.vmap(lambda x, f: prune.norm_prune(x, gain_D, EPS, f, "pallas"))(x_NxD, fraction_N)

    args = {"platform": platform, "kernels": {"keep_channels"}}
    lowers(lambda x, f: prune.keep_channels(x, f, "pallas"), rows, fraction, **args)
    lowers(pruned, rows, fraction, gain, platform=platform, kernels={"norm_prune"})
