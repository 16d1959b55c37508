"""Quest's kernels against its XLA reference and plain numpy, interpreted, and lowered for devices.

Queries and keys are small whole numbers: scores are exact whatever the order of sums, and ties are common.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels.interpreted import compiled, kernel_calls, platforms
from kernels.lowering import lowers
from pallas_kernels import quest, tuning
from pallas_kernels.dispatch import tracing_for
from pallas_kernels.errors import UnavailableError
from pallas_kernels.quest import tpu
from pallas_kernels.shapes import SHAPES, distinct
from pallas_kernels.topk import at_least_kth

quick = settings(max_examples=20, derandomize=True)
H, G, D = 2, 3, 24
RACES = pltpu.InterpretParams(detect_races=True)


def whole(rng: np.random.Generator, *shape: int, top: int = 3) -> jax.Array:
    return jnp.asarray(rng.integers(-top, top + 1, shape), jnp.float32)


def whole_bounds(rng: np.random.Generator, *shape: int, top: int = 3) -> jax.Array:
    """Bounds [*shape, 2D]: no high below its low."""
    ends = rng.integers(-top, top + 1, (2, *shape, D))
    return jnp.asarray(np.concatenate([ends.max(0), ends.min(0)], -1), jnp.float32)


# --- page bounds --------------------------------------------------------------------------------


@functools.cache
def bounds_of(platform: str, page_size: int):
    return compiled(lambda k, valid: quest.page_bounds(k, valid, page_size, "pallas"), platform)


@platforms
@pytest.mark.parametrize(("N", "page_size"), [(37, 8), (64, 16), (5, 16)])
def test_bounds(platform, N, page_size):
    @quick
    @given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
    def check(seed, share, spoilt):
        rng = np.random.default_rng(seed)
        k, valid = whole(rng, H, N, D), jnp.asarray(rng.random(N) < share)
        if spoilt:
            odd = rng.choice([np.nan, -np.nan, np.inf])
            k = k.at[rng.integers(H), rng.integers(N), rng.integers(D)].set(odd)
        got = bounds_of(platform, page_size)(k, valid)
        np.testing.assert_array_equal(got, quest.page_bounds(k, valid, page_size, "xla"))

    check()


@platforms
def test_bounds_of_bfloat16_and_many_sequences(platform):
    rng = np.random.default_rng(0)
    k, valid = jnp.asarray(rng.normal(size=(2, H, 40, D)), jnp.bfloat16), rng.random((2, 40)) < 0.8

    def each(implementation):
        return jax.vmap(lambda k, valid: quest.page_bounds(k, valid, 8, implementation))

    got = compiled(each("pallas"), platform)(k, jnp.asarray(valid))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, each("xla")(k, jnp.asarray(valid)))


# --- the choice of pages ------------------------------------------------------------------------

P, N = 19, 3  # shared and own pages


def draw_case(data):
    """Queries, bounds and masks of both parts, and a budget from 1 to more than all pages."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    top = data.draw(st.sampled_from([0, 1, 3, 1000]), label="largest")  # few values: many ties; 0: no other
    share = data.draw(st.sampled_from([0.3, 0.9, 1.0]), label="share in use")
    q = whole(rng, H, G, D)
    bounds, own = whole_bounds(rng, H, P, top=top), whole_bounds(rng, H, N, top=top)
    if data.draw(st.booleans(), label="a query of zeros"):
        q = q.at[rng.integers(H), rng.integers(G)].set(0)
    used = tuple(jnp.asarray(rng.random(n) < share) for n in (P, N))
    empty = jnp.concatenate([jnp.full(D, -jnp.inf), jnp.full(D, jnp.inf)])
    own = jnp.where(used[1][:, None], own, empty)
    return q, (bounds, own), used, jnp.int32(data.draw(st.integers(1, P + N + 2), label="pages"))


def chosen_by_sorting(q, bounds, used, pages) -> np.ndarray:
    """Masks [H, G, P + N], in float64."""
    used = np.concatenate(used)
    finite = np.where(used[:, None], np.concatenate(bounds, 1), 0).astype(np.float64)
    high, low = np.split(finite[:, None], 2, -1)
    q = np.asarray(q, np.float64)[:, :, None]
    score = np.where(used, np.maximum(q * high, q * low).sum(-1), -np.inf)
    last = min(int(pages), score.shape[-1])
    return score >= np.sort(score, -1)[..., -last, None]


@functools.cache
def select_on(platform: str, parts: int = 2, select: quest.Select = "head"):
    def chosen(q, bounds, used, pages):
        return quest.select_pages(
            q, bounds[:parts], used[:parts], pages, select=select, implementation="pallas"
        )

    return compiled(chosen, platform)


@jax.jit
def select_by_xla(q, bounds, used, pages):
    return quest.select_pages(q, bounds, used, pages, implementation="xla")


@platforms
@pytest.mark.parametrize("parts", [1, 2])
def test_select_pages(platform, parts):
    @quick
    @given(st.data())
    def check(data):
        q, bounds, used, pages = draw_case(data)
        got = select_on(platform, parts)(q, bounds, used, pages)
        reference = select_by_xla(q, bounds[:parts], used[:parts], pages)
        assert [mask.shape[-1] for mask in got] == [P, N][:parts]
        expected = chosen_by_sorting(q, bounds[:parts], used[:parts], pages)
        np.testing.assert_array_equal(np.concatenate(got, -1), expected)
        np.testing.assert_array_equal(np.concatenate(reference, -1), expected)

    check()


TIE_SHAPES = [
    (3, 3, 64, 1, 3, 1),
    (3, 1, 64, 7, 1, 1),
    (3, 3, 64, 130, 3, 1),
    (2, 1, 16, 5, 2, 3),
    (1, 4, 128, 64, 3, 5),
]


@pytest.mark.parametrize("shape", TIE_SHAPES, ids=str)
@pytest.mark.parametrize("kernels", ["xla", "gpu", "tpu"])
def test_equal_bounds_tie_in_both_parts(kernels, shape):
    """Whatever numbers they are, and whatever shapes their products have."""
    heads, group, d, shared, own, rows = shape
    used = jnp.ones(shared, bool), jnp.ones(own, bool)
    implementation = "xla" if kernels == "xla" else "pallas"

    def chosen(q, bounds):
        parts = jnp.tile(bounds, (1, shared, 1)), jnp.tile(bounds, (1, own, 1))
        choose = functools.partial(quest.select_pages, implementation=implementation)
        return jax.vmap(lambda q: choose(q, parts, used, jnp.int32(1)))(q)

    run = jax.jit(chosen) if kernels == "xla" else compiled(chosen, kernels)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        q = jnp.asarray(rng.normal(size=(rows, heads, group, d)), jnp.float32)
        for mask in run(q, jnp.asarray(rng.normal(size=(heads, 1, 2 * d)), jnp.float32)):
            assert mask.all(), f"seed {seed}: {mask.mean():.2f} of the pages are kept"


def test_group_selection_is_another_choice():
    rng = np.random.default_rng(0)
    q, bounds, used = whole(rng, H, G, D), (whole_bounds(rng, H, P),), (jnp.ones(P, bool),)
    got = select_on("gpu", 1, "group")(q, bounds, used, jnp.int32(5))[0]
    reference = quest.select_pages(q, bounds, used, jnp.int32(5), select="group", implementation="xla")[0]
    np.testing.assert_array_equal(got, reference)
    score = quest.page_scores(q, bounds[0], used[0]).sum(1)
    np.testing.assert_array_equal(got[:, 0], score >= jnp.sort(score, -1)[:, -5, None])
    assert (got == got[:, :1]).all()  # one list for a group
    assert (got != select_on("gpu", 1)(q, bounds, used, jnp.int32(5))[0]).any()


@platforms
def test_rows_share_what_they_read(platform):
    """B sequences of K rows: a vmap over rows with the bounds unbatched adds query rows, nothing else."""
    rng = np.random.default_rng(0)
    B, K, L = 2, 3, 2
    q, bounds = whole(rng, B, K, H, G, D), whole_bounds(rng, B, L, H, P)
    own = whole_bounds(rng, B, K, H, N)
    used, own_used = (jnp.asarray(rng.random((B, K, n)) < 0.8) for n in (P, N))
    pages = jnp.asarray(rng.integers(1, P + N + 1, (B, K)), jnp.int32)

    def one(q, bounds, own, used, own_used, pages):
        layer = jnp.int32(1)
        return quest.select_pages(
            q, (bounds, own), (used, own_used), pages, layer=layer, implementation="pallas"
        )

    batched = jax.vmap(jax.vmap(one, in_axes=(0, None, 0, 0, 0, 0)))
    args = (q, bounds, own, used, own_used, pages)
    got = compiled(batched, platform)(*args)
    for b in range(B):
        for k in range(K):
            expected = select_by_xla(
                q[b, k], (bounds[b, 1], own[b, k]), (used[b, k], own_used[b, k]), pages[b, k]
            )
            for mask, want in zip(got, expected, strict=True):
                np.testing.assert_array_equal(mask[b, k], want)
    calls = kernel_calls(batched, *args, platform=platform)
    reader = "page_scores" if platform == "gpu" else "select_pages"
    assert (B, L, H, P, 2 * D) in calls[reader]
    assert (B, H, K * G, 2 * D) in calls[reader]


@platforms
def test_nan_is_kept(platform):
    """A NaN query ranks all its pages alike and above any number, as in the reference."""
    rng = np.random.default_rng(0)
    q = whole(rng, H, G, D).at[1, 2].set(jnp.nan)
    case = q, (whole_bounds(rng, H, P), whole_bounds(rng, H, N)), (jnp.ones(P, bool), jnp.ones(N, bool))
    got = select_on(platform)(*case, jnp.int32(4))
    expected = select_by_xla(*case, jnp.int32(4))
    for mask, want in zip(got, expected, strict=True):
        assert mask[1, 2].all()
        np.testing.assert_array_equal(mask, want)


def test_every_nan_ranks_above_infinity():
    """Of either sign, and whatever bits of its own it has."""
    odd = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7F800000], np.uint32).view(np.float32)
    x = np.array([1, *odd, -np.inf, 3e38], np.float32)
    for k in range(1, 5):
        np.testing.assert_array_equal(at_least_kth(x, jnp.int32(k)), np.isnan(x))
    np.testing.assert_array_equal(at_least_kth(x, jnp.int32(5)), np.isnan(x) | (x == np.inf))


@platforms
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_page_of_a_nan_key_is_kept(platform, sign):
    """x86's own NaN have a minus sign, which must not rank a spoilt page below all others."""
    rng = np.random.default_rng(0)
    bounds, own = whole_bounds(rng, H, P), whole_bounds(rng, H, N)
    bounds = bounds.at[0, 5, :].set(np.copysign(np.nan, sign))
    case = whole(rng, H, G, D), (bounds, own), (jnp.ones(P, bool), jnp.ones(N, bool)), jnp.int32(2)
    got = select_on(platform)(*case)
    assert got[0][0, :, 5].all()
    for mask, want in zip(got, select_by_xla(*case), strict=True):
        np.testing.assert_array_equal(mask, want)


@platforms
@pytest.mark.parametrize("shape", distinct("group_size", "head_size"), ids=lambda s: s.name)
def test_named_shapes(platform, shape):
    """Bounds and choice with every model's heads, at a short context: the last page is partial."""
    rng = np.random.default_rng(0)
    S, page_size, kv_heads, d = 197, shape.page_size, shape.kv_heads, shape.head_size
    q = jnp.asarray(rng.integers(-3, 4, (kv_heads, shape.group_size, d)), jnp.bfloat16)
    k = jnp.asarray(rng.integers(-3, 4, (kv_heads, S, d)), jnp.bfloat16)

    def chosen(implementation):
        def of(q, k):
            bounds = quest.page_bounds(k, jnp.ones(S, bool), page_size, implementation)
            used = (jnp.ones(bounds.shape[1], bool),)
            keep = quest.select_pages(q, (bounds,), used, jnp.int32(4), implementation=implementation)
            return bounds, *keep

        return of

    bounds, keep = compiled(chosen("pallas"), platform)(q, k)
    np.testing.assert_array_equal(bounds, jax.jit(chosen("xla"))(q, k)[0])
    used = np.ones(bounds.shape[1], bool)
    np.testing.assert_array_equal(keep, chosen_by_sorting(q, (bounds,), (used,), 4))


@platforms
def test_long_contexts_rank_all_blocks_together(platform):
    """131,072 tokens in pages of 8, and a few own pages: scored in blocks, ranked as one row."""
    rng = np.random.default_rng(0)
    q = whole(rng, 1, 2, D)
    bounds = whole_bounds(rng, 1, 16384, top=50), whole_bounds(rng, 1, N, top=50)
    used, pages = (jnp.arange(16384) < 16001, jnp.ones(N, bool)), jnp.int32(1601)
    got = select_on(platform)(q, bounds, used, pages)
    np.testing.assert_array_equal(np.concatenate(got, -1), chosen_by_sorting(q, bounds, used, pages))


def test_tpu_kernels_do_not_race(capsys):
    rng = np.random.default_rng(0)
    k, valid = whole(rng, H, 1100, D), jnp.asarray(rng.random(1100) < 0.8)  # three blocks
    got = tpu.page_bounds(k, valid, 8, RACES)
    np.testing.assert_array_equal(got, quest.page_bounds(k, valid, 8, "xla"))
    q, used = whole(rng, H, G, D), jnp.arange(len(got[0])) < 120
    fresh = compiled(lambda *a: quest.select_pages(*a, implementation="pallas"), "tpu", RACES)
    keep = fresh(q, (got,), (used,), jnp.int32(9))
    np.testing.assert_array_equal(keep[0], chosen_by_sorting(q, (got,), (used,), 9))
    assert "RACE" not in capsys.readouterr().out


# --- errors and lowering ------------------------------------------------------------------------


def test_what_cannot_run_says_why():
    q, bounds, used = jnp.zeros((H, G, D)), (jnp.zeros((H, 40000, 2 * D)),), (jnp.ones(40000, bool),)
    with pytest.raises(UnavailableError, match=r"^select_pages: .* pages is 40000 .*; use 'xla' instead$"):
        quest.select_pages(q, bounds, used, jnp.int32(1), implementation="pallas")
    with pytest.raises(ValueError, match=r"^select_pages: select is 'heads' and must be"):
        quest.select_pages(q, bounds, used, jnp.int32(1), select="heads")
    with tracing_for("tpu"), pytest.raises(UnavailableError, match=r"^page_bounds: .* page_size is 4 "):
        quest.page_bounds(jnp.zeros((H, 32, D)), jnp.ones(32, bool), 4, "pallas")


def test_more_scores_than_a_tpu_holds_are_refused(monkeypatch):
    """Known only once the rows are: three heads of a group for each of K schedules."""
    row = tuning.TABLE["select_pages", "pallas", "tpu"]
    small = tuning.Kernel({**row.takes, "scores_of_a_head": range(1, 4 * G * P + 1)})
    monkeypatch.setitem(tuning.TABLE, ("select_pages", "pallas", "tpu"), small)
    bounds, used = (jnp.zeros((H, P, 2 * D)),), (jnp.ones(P, bool),)

    def chosen(q):
        return quest.select_pages(q, bounds, used, jnp.int32(1), implementation="pallas")[0]

    with tracing_for("tpu"):
        assert jax.eval_shape(jax.vmap(chosen), jnp.zeros((4, H, G, D))).shape == (4, H, G, P)
        refusal = r"^select_pages: .* scores_of_a_head is 285 and must be 1 to 228; use 'xla' instead"
        with pytest.raises(UnavailableError, match=refusal):
            jax.eval_shape(jax.vmap(chosen), jnp.zeros((5, H, G, D)))


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_gradients_are_refused(implementation):
    k, q, used = jnp.ones((H, 16, D)), jnp.ones((H, G, D)), (jnp.ones(2, bool),)
    with pytest.raises(TypeError, match=r"^page_bounds: no gradient"):
        jax.grad(lambda k: quest.page_bounds(k, jnp.ones(16, bool), 8, implementation).sum())(k)

    def chosen(q):
        bounds = (jnp.ones((H, 2, 2 * D)),)
        return quest.select_pages(q, bounds, used, jnp.int32(1), implementation=implementation)[0].sum() * 1.0

    with pytest.raises(TypeError, match=r"^select_pages: no gradient"):
        jax.grad(chosen)(q)
    with pytest.raises(TypeError, match=r"^extend_bounds: no gradient"):
        jax.grad(lambda k: quest.extend_bounds(jnp.ones((H, 2, 2 * D)), k, used[0]).sum())(q[:, 0])


def lower_choice(
    shape, K: int, platform: str, dtype: str = "bfloat16", select: quest.Select = "head"
) -> None:
    """The choice of K schedules of each sequence: of one layer's pages, and a few of their own."""
    abstract = jax.ShapeDtypeStruct
    B, kv_heads, d = shape.batch, shape.kv_heads, shape.head_size
    pages = shape.context // shape.page_size

    def chosen(q, bounds, own, used, own_used, pages, layer):
        def one(q, bounds, own, used, own_used, pages):
            parts = (bounds, own), (used, own_used)
            return quest.select_pages(q, *parts, pages, layer=layer, select=select, implementation="pallas")

        schedules = jax.vmap(one, in_axes=(0, None, 0, 0, 0, 0))
        return jax.vmap(schedules)(q, bounds, own, used, own_used, pages)

    lowers(
        chosen,
        abstract((B, K, kv_heads, shape.group_size, d), dtype),
        abstract((B, 2, kv_heads, pages, 2 * d), dtype),
        abstract((B, K, kv_heads, 3, 2 * d), dtype),
        abstract((B, K, pages), bool),
        abstract((B, K, 3), bool),
        abstract((B, K), jnp.int32),
        abstract((), jnp.int32),
        platform=platform,
        kernels={"own_page_scores", "select_pages"} | ({"page_scores"} if platform == "cuda" else set()),
    )


@pytest.mark.parametrize("shape", distinct("name", "page_size"), ids=str)
def test_lowering_of_one_choice_for_a_group(shape):
    """A TPU's kernel has none."""
    for K in (1, 16):
        lower_choice(shape, K, "cuda", select="group")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.batch == 8], ids=str)
def test_lowering_of_training(shape, platform):
    if platform == "tpu" and shape.context >= 131072 and shape.page_size <= 8:
        with pytest.raises(UnavailableError, match="scores_of_a_head is 786432"):  # more than its memory
            lower_choice(shape, 16, platform)
    else:
        lower_choice(shape, 16, platform)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lowering(shape, platform):
    abstract = jax.ShapeDtypeStruct
    B, kv_heads, d, page_size = shape.batch, shape.kv_heads, shape.head_size, shape.page_size
    # float32 where the load is a new model's first: the loads that follow change grids alone.
    for dtype in ("bfloat16", "float32")[: 1 + (shape in distinct("name", "page_size"))]:
        lower_choice(shape, 1, platform, dtype)
        lowers(
            jax.vmap(lambda k, valid: quest.page_bounds(k, valid, page_size, "pallas")),
            abstract((B, kv_heads, shape.context, d), dtype),
            abstract((B, shape.context), bool),
            platform=platform,
            kernels={"page_bounds"},
        )
