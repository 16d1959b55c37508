"""The gated MLP's kernels against float64, interpreted, lowered for devices, and compiled where Triton is."""

import dataclasses
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
from kernels.lowering import lowers
from pallas_kernels.dispatch import tracing_for
from pallas_kernels.errors import UnavailableError
from pallas_kernels.gated_mlp import MAX_ROWS, gated_hidden, gpu, tpu
from pallas_kernels.shapes import distinct
from pallas_kernels.tuning import TABLE

quick = settings(max_examples=12, derandomize=True)
kernels = devices.either(gpu, tpu)
BOUND = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


@functools.cache
def jitted(kernels, interpret=None):
    return jax.jit(functools.partial(kernels.gated_hidden, interpret=interpret or devices.interpret(kernels)))


def make_weights(D: int, F: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Stacks of two layers, the first of which would be noticed."""
    rng = np.random.default_rng(0)
    gate, up = (np.float32(rng.normal(size=(2, D, F)) * D**-0.5) for _ in range(2))
    gate[0], up[0] = 100, 100
    return jnp.asarray(gate, dtype), jnp.asarray(up, dtype)


def draw_rows(data, N: int, D: int, dtype) -> jax.Array:
    """Rows with their own share of zeros, of one or no channel, now and then with NaN or infinity."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    keep = data.draw(st.lists(st.sampled_from([0, 0.05, 0.4, 0.9, 1]), min_size=N, max_size=N), label="keep")
    x = np.where(rng.random((N, D)) < np.array(keep)[:, None], rng.normal(size=(N, D)), 0)
    for odd in data.draw(st.lists(st.sampled_from([np.nan, np.inf]), max_size=1), label="odd"):
        x[rng.integers(N), rng.integers(D)] = odd
    return jnp.asarray(x, dtype)


def exact(x: jax.Array, gate_DxF: jax.Array, up_DxF: jax.Array) -> np.ndarray:
    with np.errstate(all="ignore"):
        x, gate, up = (np.asarray(a, np.float64) for a in (x, gate_DxF, up_DxF))
        opened = x @ gate
        return opened / (1 + np.exp(-opened)) * (x @ up)


@kernels
@pytest.mark.parametrize(
    ("N", "D", "F", "dtype"),
    [
        (1, 576, 256, jnp.bfloat16),
        (1, 24, 384, jnp.float32),
        (2, 136, 128, jnp.bfloat16),
        (3, 40, 1536, jnp.float32),
    ],
)
def test_against_float64(kernels, N, D, F, dtype):
    gate, up = make_weights(D, F, dtype)

    @quick
    @given(st.data())
    def check(data):
        x = draw_rows(data, N, D, dtype)
        got = np.asarray(jitted(kernels)(x, jnp.int32(1), gate, up))
        expected = exact(x, gate[1], up[1])
        # A NaN or an infinity spoils its row, as in a dense product, and no other.
        spoilt = ~np.isfinite(np.asarray(x, np.float32)).all(1)
        assert not np.isfinite(got[spoilt]).any()
        np.testing.assert_allclose(got[~spoilt], expected[~spoilt], rtol=BOUND[dtype], atol=BOUND[dtype])

    check()


def test_columns_that_fill_no_tile():
    """A GPU takes any width; what lies after the last column is not touched."""
    x, (gate, up) = jnp.ones((1, 16)), make_weights(16, 300, jnp.float32)
    got = jitted(gpu)(x, jnp.int32(1), gate, up)
    np.testing.assert_allclose(got, exact(x, gate[1], up[1]), rtol=1e-5, atol=1e-6)


@kernels
def test_weights_of_pruned_channels_are_not_read(kernels):
    """NaN in the rows of channels that are zero never gets into a sum."""
    gate, up = make_weights(64, 256, jnp.float32)
    there = np.arange(64) % 3 == 0
    hidden = np.where(there[None, :, None], [gate, up], np.nan).astype(np.float32)
    x = jnp.where(there, jnp.linspace(-1, 1, 64), 0)[None]
    got = jitted(kernels)(x, jnp.int32(1), *hidden)
    np.testing.assert_allclose(got, exact(x, gate[1], up[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("N", [1, 2, 3, 4, 9])  # kernels up to three, dense from there
@pytest.mark.parametrize("name", devices.IMPLEMENTATIONS)
def test_any_number_of_rows(name, N, dtype):
    """Gather, union and dense product give what the reference gives row by row."""
    rng = np.random.default_rng(N)
    x = np.where(rng.random((N, 64)) < 0.4, rng.normal(size=(N, 64)), 0).astype(np.float32)
    gate, up = make_weights(64, 256, dtype)
    one = jax.jit(lambda x: gated_hidden(x, gate[1], up[1], "xla"))
    expected = [one(row) for row in x]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    by_layer = jax.jit(jax.vmap(lambda x: gated_hidden(x, gate, up, name, jnp.int32(1))))
    close(by_layer(x), expected)
    close(jax.jit(lambda x: gated_hidden(x, gate[1], up[1], name))(x), expected)  # a leading axis
    close(jax.jit(jax.vmap(lambda x: gated_hidden(x, gate, up, "xla", jnp.int32(1))))(x), expected)


def kernels_called(fn, *args) -> int:
    return str(jax.make_jaxpr(fn)(*args)).count("pallas_call")


def test_strategy_by_number_of_rows(monkeypatch):
    gate, up = make_weights(64, 256, jnp.float32)

    def rows(N, name):
        return kernels_called(jax.vmap(lambda x: gated_hidden(x, gate[0], up[0], name)), jnp.ones((N, 64)))

    assert [rows(N, "pallas") for N in (1, 2, 3, 4, 9)] == [2, 2, 2, 0, 0]
    assert [rows(N, "xla") for N in (1, 9)] == [0, 0]
    assert MAX_ROWS == {"pallas": 3, "triton": 1}
    paying = dataclasses.replace(TABLE["gated_hidden", "pallas", "gpu"], pays={"rows": (1, 2)})
    monkeypatch.setitem(TABLE, ("gated_hidden", "pallas", "gpu"), paying)
    with tracing_for("cuda"):
        assert [rows(N, "auto") for N in (1, 2, 3)] == [2, 2, 0]


def test_vmaps_of_sequences_and_schedules():
    """Nested vmaps add up; weights batched as well (one model each) run one after another."""
    rng = np.random.default_rng(0)
    gate, up = make_weights(64, 128, jnp.float32)
    x = np.where(rng.random((1, 3, 64)) < 0.4, rng.normal(size=(1, 3, 64)), 0).astype(np.float32)
    one = functools.partial(gated_hidden, implementation="pallas")
    nested = jax.vmap(jax.vmap(lambda x: one(x, gate[1], up[1])))
    np.testing.assert_allclose(nested(x), exact(x, gate[1], up[1]), rtol=1e-5, atol=1e-6)
    models = jax.vmap(one)(x[0, :2], gate, up)
    for i in range(2):
        np.testing.assert_allclose(models[i], exact(x[0, i], gate[i], up[i]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_gradients_are_refused(implementation):
    x, (gate, up) = jnp.ones(64), make_weights(64, 128, jnp.float32)
    for argument in range(3):
        with pytest.raises(TypeError, match=r"^gated_hidden: no gradient"):
            jax.grad(lambda *args: gated_hidden(*args, implementation).sum(), argument)(x, gate[0], up[0])


def test_triton_is_refused_on_a_cpu():
    gate, up = make_weights(64, 128, jnp.float32)
    refusal = r"^gated_hidden: 'triton' cannot run on this platform"
    with tracing_for("cpu"), pytest.raises(UnavailableError, match=refusal):
        gated_hidden(jnp.ones(64), gate[0], up[0], "triton")


# --- TPU: copies in flight ----------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, 0.4, 1.0])
def test_tpu_kernel_does_not_race(keep, capsys):
    rng = np.random.default_rng(0)
    gate, up = make_weights(40, 256, jnp.float32)
    x = np.where(rng.random((2, 40)) < keep, rng.normal(size=(2, 40)), 0).astype(np.float32)
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    got = jitted(tpu, params)(x, jnp.int32(1), gate, up)
    np.testing.assert_allclose(got, exact(x, gate[1], up[1]), rtol=1e-5, atol=1e-6)
    assert "RACE" not in capsys.readouterr().out


def test_a_race_would_be_seen(capsys):
    def hasty(x_ref, out_ref, semaphore):
        copy = pltpu.make_async_copy(x_ref, out_ref, semaphore)
        copy.start()
        out_ref[...] = jnp.zeros_like(out_ref)
        copy.wait()

    x, raised = jnp.ones((8, 128)), ""
    run = pl.pallas_call(
        hasty,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(detect_races=True),
    )
    try:
        jax.block_until_ready(run(x))
    except jax.errors.JaxRuntimeError as error:  # since jax 0.12; before, it was printed only
        raised = str(error)
    assert "RACE" in capsys.readouterr().out + raised


# --- devices that are not here ------------------------------------------------------------------


def abstract(shape, N: int, dtype=jnp.bfloat16) -> tuple[jax.ShapeDtypeStruct, ...]:
    weights = jax.ShapeDtypeStruct((16, shape.hidden, shape.ffn), dtype)
    x, layer = jax.ShapeDtypeStruct((N, shape.hidden), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    return x, weights, weights, layer


def rows_of_pallas(x_NxD, gate, up, layer):
    return jax.vmap(lambda x: gated_hidden(x, gate, up, "pallas", layer))(x_NxD)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("shape", distinct("hidden", "ffn"), ids=lambda s: s.name)
def test_lowering(shape, platform):
    kernels = {"compact", "gather_gemv"} if platform == "cuda" else {"gather_gemv"}
    for N in (1, 2, 3):
        lowers(rows_of_pallas, *abstract(shape, N), platform=platform, kernels=kernels)
    lowers(rows_of_pallas, *abstract(shape, 1, jnp.float32), platform=platform, kernels=kernels)
    for N in (8, 128):
        lowers(rows_of_pallas, *abstract(shape, N), platform=platform, kernels=set())


@pytest.mark.parametrize("shape", distinct("hidden", "ffn"), ids=lambda s: s.name)
def test_triton_kernels_compile_for_hopper(shape):
    """Triton needs no GPU to compile for one: every share's loads are 16 bytes wide, and nothing spills."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from pallas_kernels.gated_mlp import triton as kernels

    def ptx(kernel, warps: int, **constants: int) -> str:
        types = {"layer_ptr": "*i32", "channels_ptr": "*i32", "count_ptr": "*i32", "sums_ptr": "*fp32"}
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*bf16") for name in kernel.arg_names
        }
        aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t[0] == "*"}
        source = triton.compiler.ASTSource(
            kernel,
            signature,
            {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants},
            aligned,
        )
        options = {"num_warps": warps, "num_stages": 1}
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

    channels, (columns, (_, shares)) = kernels.CHANNELS, gpu.tiling(shape.ffn)
    sizes = {"D": shape.hidden, "F": shape.ffn, "SHARES": shares, "CHANNELS": channels, "COLUMNS": columns}
    gather = ptx(kernels.gather_gemv, gpu.WARPS, **sizes)
    per_thread = 2 * channels * columns * 2 // (32 * gpu.WARPS) // 16  # of 16 bytes, gate and up
    assert gather.count(".v4.b32 {") == per_thread
    lanes = triton.next_power_of_2(shape.hidden)
    assert "st.global" in ptx(kernels.list_channels, 8, D=shape.hidden, LANES=lanes)
