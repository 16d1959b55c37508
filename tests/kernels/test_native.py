"""The CPU's kernels against their XLA references, for every set of instructions that this machine has."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import attention, dispatch, gated_mlp, linear, native, prune, quantize, quest
from pallas_kernels.dispatch import choose
from pallas_kernels.errors import UnavailableError
from sol_jax.models import llama

quick = settings(max_examples=15, derandomize=True)
built = pytest.mark.skipif(native.problem() is not None, reason=f"no library: {native.problem()}")
KERNELS = ("baseline", "avx2", "avx512")
DTYPES = ("float32", "bfloat16")


@pytest.fixture(params=KERNELS)
def instructions(request):
    if not native.use_instruction_set(request.param):
        pytest.skip(f"this machine has no {request.param}")
    assert native.instruction_set() == request.param
    yield request.param
    native.use_instruction_set()


def normal(rng, *shape, dtype="float32"):
    return jnp.asarray(rng.normal(size=shape), dtype)


def close(got, expected, size: float = 1e-5):
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), size, size)


def wide(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "D", "F"), [(1, 24, 40), (1, 576, 192), (3, 65, 97), (9, 16, 8)])
def test_products(instructions, rows, D, F, dtype):
    rng = np.random.default_rng(0)
    x, weights = normal(rng, rows, D), [normal(rng, 3, D, size, dtype=dtype) for size in (F, 33)]
    table = normal(rng, F, D, dtype=dtype)
    got = jax.vmap(lambda x: linear.project(x, weights, "native", jnp.int32(2)))(x)
    operand = wide(x.astype(dtype))
    for y, w in zip(got, weights, strict=True):
        close(y, operand @ wide(w)[2], 1e-4)
    close(linear.match(x, table, "native"), operand @ wide(table).T, 1e-4)


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4])
def test_gated_products_skip_what_is_zero_in_every_row(instructions, rows, dtype):
    rng = np.random.default_rng(0)
    D, F = 70, 100
    x = normal(rng, rows, D).at[:, ::3].set(0)
    gate, up = (normal(rng, 2, D, F, dtype=dtype) / D**0.5 for _ in range(2))
    spoilt = gate.at[:, ::3].set(jnp.nan)
    got = jax.vmap(lambda x: gated_mlp.gated_hidden(x, spoilt, up, "native", jnp.int32(1)))(x)
    operand = wide(x.astype(dtype))
    g, u = operand @ wide(gate)[1], operand @ wide(up)[1]
    close(got, g / (1 + np.exp(-g)) * u)
    nan = gated_mlp.gated_hidden(x[0].at[1].set(jnp.nan), gate, up, "native", jnp.int32(1))
    assert np.isnan(nan).all()


H, G = 2, 3


# Sizes of heads, pages of the prefix, pages of a row's own, and batches; each is compiled once.
CHOICES = [(8, 1, 3, 2, 2), (24, 70, 1, 1, 1), (64, 19, 3, 1, 1), (24, 19, 1, 2, 2)]


def choice(data, dtype):
    """Queries, bounds of stacked layers and of a row's own pages, what is in use, and a budget; many ties."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    d, P, N, B, K = data.draw(st.sampled_from(CHOICES))
    top = data.draw(st.sampled_from([0, 1, 3]))

    def whole(*shape):
        return jnp.asarray(rng.integers(-top, top + 1, shape), dtype)

    used, own_used = rng.random((B, K, P)) < 0.8, rng.random((B, K, N)) < 0.8
    pages = jnp.asarray(rng.integers(1, P + N + 2, (B, K)), jnp.int32)
    bounds, own = whole(B, 2, H, P, 2 * d), whole(B, K, H, N, 2 * d)
    return whole(B, K, H, G, d), bounds, own, jnp.asarray(used), jnp.asarray(own_used), pages


@functools.partial(jax.jit, static_argnums=(0, 1))
def chosen(implementation, select, q, bounds, own, used, own_used, pages):
    def one(q, bounds, own, used, own_used, pages):
        parts = (bounds, own), (used, own_used)
        return quest.select_pages(
            q, *parts, pages, layer=jnp.int32(1), select=select, implementation=implementation
        )

    return jax.vmap(jax.vmap(one, (0, None, 0, 0, 0, 0)))(q, bounds, own, used, own_used, pages)


@built
@pytest.mark.parametrize("select", ["head", "group"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_choice_of_pages(instructions, dtype, select):
    """Whole numbers make scores exact, so choices agree to the bit, ties included."""

    @quick
    @given(st.data())
    def check(data):
        case = choice(data, dtype)
        for got, expected in zip(chosen("native", select, *case), chosen("xla", select, *case), strict=True):
            np.testing.assert_array_equal(got, expected)

    check()


@built
def test_equal_bounds_tie_in_both_parts(instructions):
    for d, shared, own in [(64, 1, 3), (24, 130, 3), (8, 67, 2)]:
        rng = np.random.default_rng(d)
        one = rng.normal(size=(H, 1, 2 * d)).astype(np.float32)
        bounds = jnp.tile(one, (1, shared, 1)), jnp.tile(one, (1, own, 1))
        used = jnp.ones(shared, bool), jnp.ones(own, bool)
        q = normal(rng, H, G, d)
        for mask in quest.select_pages(q, bounds, used, jnp.int32(1), implementation="native"):
            assert mask.all()


# Prefix, own entries, page, size of heads, batches, and whether each head has a mask of its own.
ATTENDED = [
    (5, 1, 8, 8, 1, 1, True), (61, 3, 8, 24, 2, 3, True), (700, 16, 4, 64, 1, 1, False),
    (64, 2, 1, 96, 2, 3, False), (700, 16, 8, 64, 1, 1, True),
]  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def attended(implementation, page, q, k, v, own, keep, own_keep, length):
    def one(q, k, v, own, keep, own_keep, length):
        return attention.attend(
            q, (k, v), own, keep, own_keep, length, page, layer=jnp.int32(1), implementation=implementation
        )

    return jax.vmap(jax.vmap(one, (0, None, None, 0, 0, 0, 0)))(q, k, v, own, keep, own_keep, length)


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(instructions, dtype):
    """Over prefixes of stacked layers and a row's own entries, with masks of every rank that steps have."""

    @quick
    @given(st.data())
    def check(data):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
        S, T, page, d, B, K, wide_mask = data.draw(st.sampled_from(ATTENDED))
        P, share = -(-S // page), data.draw(st.sampled_from([0.0, 0.2, 1.0]))
        k, v = (normal(rng, B, 2, H, S, d, dtype=dtype) for _ in range(2))
        own = tuple(normal(rng, B, K, H, T, d, dtype=dtype) for _ in range(2))
        heads = (H, G) if wide_mask else (1, 1)
        keep, own_keep = rng.random((B, K, *heads, P)) < share, rng.random((B, K, *heads, T)) < 0.7
        own_keep[..., -1] = True
        length = jnp.asarray(rng.integers(0, S + 1, (B, K)), jnp.int32)

        q = normal(rng, B, K, H, G, d, dtype=dtype)
        given = q, k, v, own, keep, own_keep, length
        size = 3e-6 if dtype == "float32" else 1e-2  # the reference rounds its weights to bfloat16
        close(attended("native", page, *given), attended("xla", page, *given), size)

    check()


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds(instructions, dtype):
    rng = np.random.default_rng(0)
    k = normal(rng, 2, H, 37, 24, dtype=dtype).at[0, 1, 5, 3].set(jnp.nan).at[1, 0, 9, 2].set(jnp.inf)
    valid = jnp.asarray(rng.random((2, 37)) < 0.7)
    for page in (1, 8, 16):
        got = jax.vmap(functools.partial(quest.page_bounds, page_size=page, implementation="native"))(
            k, valid
        )
        assert got.dtype == k.dtype
        np.testing.assert_array_equal(np.asarray(got, np.float32), plain_bounds(k, valid, page))


def plain_bounds(k, valid, page: int) -> np.ndarray:
    """By numpy, whose maximum keeps NaN; XLA's on CPUs loses one now and then."""
    pages = -(-k.shape[2] // page)
    bounds = np.zeros((2, H, pages, 48), np.float32)
    for b, p in np.ndindex(2, pages):
        here = np.asarray(k[b], np.float32)[:, p * page : (p + 1) * page]
        here = here[:, np.asarray(valid[b])[p * page : (p + 1) * page]]
        bounds[b, :, p, :24] = here.max(1, initial=-np.inf)
        bounds[b, :, p, 24:] = here.min(1, initial=np.inf)
    return bounds


@functools.cache
def by_rows(fn, implementation):
    """Of rows and something for each, and where it is needed a gain for all."""
    alone = functools.partial(fn, implementation=implementation)

    def rows(*args, gain=None):
        given = {} if gain is None else {"gain": gain}
        return jax.vmap(functools.partial(alone, **given))(*args)

    return jax.jit(rows)


def norm_prune(x, keep, *, gain, implementation):
    return prune.norm_prune(x, gain, 1e-5, keep, implementation)


def quantize_residual(y, bits, residual, *, gain, implementation):
    return quantize.quantize_residual(y, bits, residual, gain, 1e-5, implementation)


@built
def test_rows(instructions):
    """Pruning and rounding: what is kept and each rounded number agree to the bit."""

    @quick
    @given(st.data())
    def check(data):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
        N, D = data.draw(st.sampled_from([(1, 5), (3, 96), (2, 577)]))
        x = rng.normal(size=(N, D)).astype(np.float32)
        if data.draw(st.booleans(), label="ties"):
            x = np.round(x)
        keep, bits = jnp.asarray(rng.random(N), jnp.float32), jnp.asarray(rng.integers(2, 18, N))
        for fn, of in ((prune.keep_channels, keep), (quantize.fake_quantize, bits)):
            got, expected = (by_rows(fn, name)(x, of) for name in ("native", "xla"))
            np.testing.assert_array_equal(got, expected)
        gain, residual = normal(rng, D), normal(rng, N, D)
        pruned, plain = (by_rows(norm_prune, name)(x, keep, gain=gain) for name in ("native", "xla"))
        count, kept = np.asarray(pruned.num_kept), np.asarray(pruned.x_D) != 0
        assert (count >= np.minimum(count, np.asarray(plain.num_kept))).all()
        for n in range(N):
            listed = np.asarray(pruned.channels_D[n])
            assert sorted(listed) == list(range(D))
            assert set(np.flatnonzero(kept[n])) <= set(listed[: count[n]])
        of_native, expected = (
            by_rows(quantize_residual, name)(x, bits, residual, gain=gain) for name in ("native", "xla")
        )
        for got, want in zip(of_native, expected, strict=True):
            close(got, want, 2e-6)

    check()


@built
def test_odd_numbers_in_rows(instructions):
    """NaN counts as largest and spoils a scale; infinite and tiny rows are as in the reference."""
    rows = jnp.asarray(
        [
            [1.0, jnp.nan, -2, 0, 3],
            [jnp.inf, 1, 2, -1, 0],
            [0, -0.0, 0, 0, 0],
            [1e-30, 2e-30, 0, 1e-31, 3e-30],
        ]
    )
    for fn, of in ((prune.keep_channels, 0.4), (quantize.fake_quantize, 5)):
        got, expected = (fn(rows, jnp.full(4, of), name) for name in ("native", "xla"))
        np.testing.assert_array_equal(got, expected)


@built
def test_auto_takes_them_for_few_rows():
    for op, dtype in (("project", "bfloat16"), ("gated_hidden", "float32"), ("norm_prune", "float32")):
        assert choose(op, None, platform="cpu", rows=1, dtype=dtype) == "native"
        assert choose(op, None, platform="cpu", rows=64, dtype=dtype) == "xla"
        assert choose(op, None, platform="cpu", rows=1, dtype="float16") == "xla"


@built
@pytest.mark.parametrize("schedules", [1, 40])
def test_many_rows_are_left_to_xla(schedules):
    """The same op, vmapped: a custom call for few rows, none for many."""

    def project(x):
        return jax.vmap(lambda x: linear.project(x, [jnp.ones((4, 6))])[0])(x)

    text = jax.jit(project).lower(jnp.ones((schedules, 4))).as_text()
    assert ("sol_project" in text) == (schedules == 1)


def refused(op, **facts):
    with pytest.raises(UnavailableError) as caught:
        choose(op, "native", **facts)
    return str(caught.value)


@built
def test_refusals():
    assert refused("gated_hidden", platform="cpu", dtype="float16") == (
        "gated_hidden: 'native' cannot take numbers of this type because dtype is float16 and must be "
        "float32 or bfloat16; use 'xla' instead"
    )
    assert "because it has no gpu kernel; use 'pallas' or 'triton' or 'xla' instead" in refused(
        "gated_hidden", platform="gpu"
    )


@pytest.fixture
def anew():
    """`problem` asked again, within the test and after it."""
    native.problem.cache_clear()
    native.load.cache_clear()
    yield
    native.problem.cache_clear()
    native.load.cache_clear()


def test_a_library_that_is_not_there(anew, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    assert choose("attend", None, platform="cpu", rows=1, dtype="float32") == "xla"
    assert refused("attend", platform="cpu") == (
        "attend: 'native' cannot run on this platform (cpu) because it was not compiled when this was "
        "installed (with a C++ compiler: pip install -e .); use 'xla' instead"
    )


def test_a_library_that_does_not_load(anew, monkeypatch, tmp_path):
    (tmp_path / "_library.so").write_bytes(b"no library")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    said = refused("attend", platform="cpu")
    assert re.search(r"because its library does not load: .*; use 'xla' instead$", said)


@built
def test_a_library_for_another_jax(anew, monkeypatch):
    monkeypatch.setattr(native, "interface", lambda: "7.1")
    ours = native.load().sol_interface().decode()
    assert (
        f"it was compiled for XLA's interface {ours} and this jax has 7.1 (again: pip install --no"
        in refused("attend", platform="cpu")
    )


def test_auto_says_once_why_it_does_without(anew, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    dispatch._say_once.cache_clear()
    for _ in range(2):
        choose("attend", None, platform="cpu", rows=1, dtype="float32")
    (message,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith("decode steps go without the CPU's kernels: it was not compiled")


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(dtype):
    rng = np.random.default_rng(0)
    hidden = normal(rng, 40)
    for name, shape in (("embed", (70, 40)), ("lm_head", (40, 70))):
        weights = {"embed": jnp.zeros((70, 40), dtype), name: normal(rng, *shape, dtype=dtype)}
        close(llama.logits(weights, hidden, "native"), llama.logits(weights, hidden), 1e-5)
