"""Quantisation kernels against numpy and the XLA reference, interpreted, and lowered for devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels import devices
from kernels.lowering import lowers
from pallas_kernels import quantize
from pallas_kernels.dispatch import current_platform, tracing_for
from pallas_kernels.quantize import gpu, tpu
from pallas_kernels.quantize.op import top_or_zero
from pallas_kernels.shapes import distinct

quick = settings(max_examples=30, derandomize=True)
kernels = devices.either(gpu, tpu)
EPS = 1e-5


@functools.cache
def alone(kernels, interpret=None):
    return jax.jit(
        functools.partial(kernels.fake_quantize, interpret=interpret or devices.interpret(kernels))
    )


@functools.cache
def fused(kernels, interpret=None):
    return jax.jit(
        lambda *args: kernels.quantize_residual(*args, EPS, interpret or devices.interpret(kernels))
    )


def draw_rows(data, N: int, D: int) -> np.ndarray:
    """Rows with many values on the edge of two steps, some of zeros alone, some with NaN or infinity."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    y = rng.normal(size=(N, D)).astype(np.float32) * np.float32(10.0) ** rng.integers(-12, 4, (N, 1))
    edges = rng.integers(-7, 8, (N, D)) / 2  # with 3 bits and a largest of 3
    y = np.where(rng.random((N, 1)) < 0.4, np.clip(edges, -3, 3), y).astype(np.float32)
    for odd in data.draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf]), max_size=2), label="odd"):
        y[rng.integers(N), rng.integers(D)] = odd
    if data.draw(st.booleans(), label="a row of zeros"):
        y[rng.integers(N)] = 0
    return y


def by_numpy(y_D: np.ndarray, bits: int) -> np.ndarray:
    if bits >= 16:
        return y_D
    top = np.float32(2 ** (bits - 1) - 1)
    with np.errstate(invalid="ignore"):
        scale = np.maximum(np.abs(y_D).max(), np.float32(1e-8)) / top
        return np.clip(np.round(y_D / scale), -top, top) * scale


def assert_stream(stream: np.ndarray, residual: np.ndarray, rounded: np.ndarray) -> None:
    """The sum, rounded; compilers may keep the product inside it exact (a fused multiply-add)."""
    largest = np.max(np.abs(rounded), 1, keepdims=True, initial=0, where=np.isfinite(rounded))
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(np.isfinite(stream), finite)
    np.testing.assert_array_less(
        np.abs(stream - (residual + rounded))[finite],
        (2.0**-23 * (np.abs(residual) + largest))[finite],
    )


def draw_bits(data, N: int) -> np.ndarray:
    bits = st.sampled_from([3, 3, 16]) | st.integers(2, 20)
    return np.array(data.draw(st.lists(bits, min_size=N, max_size=N), label="bits"), np.float32)


@kernels
@pytest.mark.parametrize(("N", "D"), [(1, 576), (9, 37), (8, 1), (3, 128)])
def test_fake_quantize_is_exact(kernels, N, D):
    @quick
    @given(st.data())
    def check(data):
        y, bits = draw_rows(data, N, D), draw_bits(data, N)
        expected = np.stack([by_numpy(row, int(b)) for row, b in zip(y, bits, strict=True)])
        if current_platform() == "cpu":  # XLA's division on a GPU is off by up to 2 units
            np.testing.assert_array_equal(quantize.fake_quantize(y, bits, "xla"), expected)
        np.testing.assert_array_equal(alone(kernels)(y, top_or_zero(bits)), expected)

    check()


@kernels
@pytest.mark.parametrize(("N", "D"), [(1, 576), (9, 37)])
def test_quantize_residual(kernels, N, D):
    """The stream is exact but for one rounding, the norm within rounding of float64's."""

    @quick
    @given(st.data())
    def check(data):
        y, bits = draw_rows(data, N, D), draw_bits(data, N)
        rng = np.random.default_rng(0)
        residual, gain = rng.normal(size=(N, D)).astype(np.float32), rng.uniform(0.5, 2, D).astype(np.float32)
        stream, normed = fused(kernels)(y, top_or_zero(bits), residual, gain)
        rounded = np.stack([by_numpy(row, int(b)) for row, b in zip(y, bits, strict=True)])
        assert_stream(stream, residual, rounded)
        wide = np.asarray(stream, np.float64)
        with np.errstate(invalid="ignore"):
            exact = wide / np.sqrt((wide**2).mean(1, keepdims=True) + EPS) * gain
        np.testing.assert_allclose(normed, exact, rtol=1e-5, atol=1e-6)

    check()


@kernels
def test_bfloat16_rows(kernels):
    """The arithmetic is float32, the result rounded once; a stream keeps its own type."""
    rng = np.random.default_rng(0)
    y, bits = jnp.asarray(rng.normal(size=(9, 37)), jnp.bfloat16), jnp.arange(8.0, 17.0)
    residual, gain = jnp.asarray(rng.normal(size=(9, 37)), jnp.float32), jnp.ones(37, jnp.bfloat16)
    expected = np.stack([by_numpy(np.float32(row), int(b)) for row, b in zip(y, bits, strict=True)])
    expected = jnp.asarray(expected, jnp.bfloat16)
    got = alone(kernels)(y, top_or_zero(bits))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, expected)
    stream, normed = fused(kernels)(y, top_or_zero(bits), residual, gain)
    assert stream.dtype == normed.dtype == jnp.float32
    np.testing.assert_array_equal(stream, residual + expected)  # a rounded product is not fused


@pytest.mark.parametrize("N", [1, 3, 9])
def test_rows_of_vmaps_are_those_of_a_loop(N):
    rng = np.random.default_rng(N)
    y, residual = rng.normal(size=(2, N, 40)).astype(np.float32)
    bits, gain = rng.integers(2, 17, N).astype(np.float32), jnp.asarray(rng.normal(size=40), jnp.bfloat16)

    def both(name, y_D, bits, residual_D):
        fused = quantize.quantize_residual(y_D, bits, residual_D, gain, EPS, name)
        return quantize.fake_quantize(y_D, bits, name), *fused

    rounded, *fused = jax.jit(jax.vmap(functools.partial(both, "pallas")))(y, bits, residual)
    expected = [by_numpy(row, int(b)) for row, b in zip(y, bits, strict=True)]
    np.testing.assert_array_equal(rounded, expected)
    for name in ("pallas", "xla"):
        one = jax.jit(functools.partial(both, name))
        loop = [one(*row)[1:] for row in zip(y, bits, residual, strict=True)]
        np.testing.assert_allclose(fused, [*zip(*loop, strict=True)], rtol=1e-5, atol=1e-6)


def test_leading_axes():
    y = np.random.default_rng(0).normal(size=(2, 3, 40)).astype(np.float32)
    for bits in (5, np.float32([2, 8, 16]), np.full((2, 3), 4)):
        rows = zip(y.reshape(6, 40), np.broadcast_to(bits, (2, 3)).ravel(), strict=True)
        expected = np.stack([by_numpy(row, int(b)) for row, b in rows]).reshape(2, 3, 40)
        np.testing.assert_array_equal(quantize.fake_quantize(y, bits, "pallas"), expected)


def test_tpu_kernels_do_not_race(capsys):
    rng = np.random.default_rng(0)
    y, top = rng.normal(size=(9, 130)).astype(np.float32), top_or_zero(np.arange(8, 17))
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    np.testing.assert_array_equal(alone(tpu, params)(y, top), alone(gpu)(y, top))
    args = (y, top, y[::-1].copy(), np.ones(130, np.float32))
    got, expected = fused(tpu, params)(*args), fused(gpu)(*args)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("op", ["fake_quantize", "quantize_residual"])
def test_gradients_are_refused(op, implementation):
    y, ones = jnp.arange(1.0, 9.0), jnp.ones(8)
    fn = {
        "fake_quantize": lambda y: quantize.fake_quantize(y, 5, implementation),
        "quantize_residual": lambda y: quantize.quantize_residual(y, 5, ones, ones, EPS, implementation)[0],
    }[op]
    with pytest.raises(TypeError, match=f"^{op}: no gradient"):
        jax.grad(lambda y: jnp.sum(fn(y)))(y)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("shape", distinct("hidden", "batch"), ids=lambda s: f"{s.name}-{s.batch}")
def test_lowering(shape, platform):
    rows = jax.ShapeDtypeStruct((shape.batch, shape.hidden), jnp.float32)
    bits = jax.ShapeDtypeStruct((shape.batch,), jnp.float32)
    gain = jax.ShapeDtypeStruct((shape.hidden,), jnp.bfloat16)

    def residual(y_NxD, bits_N, residual_NxD, gain_D):
        return jax.vmap(lambda y, b, r: quantize.quantize_residual(y, b, r, gain_D, EPS, "pallas"))(
            y_NxD, bits_N, residual_NxD
        )

    args = {"platform": platform, "kernels": {"fake_quantize"}}
    lowers(lambda y, b: quantize.fake_quantize(y, b, "pallas"), rows, bits, **args)
    lowers(residual, rows, bits, rows, gain, platform=platform, kernels={"quantize_residual"})


def test_cuda_divides_as_ieee_754_asks():
    """Triton's own division of float32 does not."""
    rows = jax.ShapeDtypeStruct((8, 64), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.float32)
    with tracing_for("cuda"):
        jaxpr = str(jax.make_jaxpr(lambda y, bits: quantize.fake_quantize(y, bits, "pallas"))(*rows))
    assert jaxpr.count("div.rn.f32") == 2
    assert " div " not in jaxpr
