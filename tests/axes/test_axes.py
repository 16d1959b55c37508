"""The axes against plain loops: thresholds, pruning, quantisation, the choice of keys, joint actions.

Queries and keys are small whole numbers, so that every score is exact, and equal ones are common.
"""

import functools
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attended import attended
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.prune import keep_channels
from pallas_kernels.quantize import fake_quantize
from pallas_kernels.quest import page_bounds
from pallas_kernels.topk import at_least_kth
from sol_jax.axes.base import ActionSpace, Axis
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest, Recency, Relevancy
from sol_jax.axes.key_selection import KeysInReach, exact_ceil, float32_ceil
from sol_jax.axes.rho import ChannelPruning

quick = settings(max_examples=60, derandomize=True)
# The CPU takes subnormal numbers for zeros.
floats = st.floats(width=32, allow_nan=False, allow_subnormal=False)
kappas = st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 0.6, 0.7, 0.9, 1.0]) | st.floats(2**-6, 1.0, width=32)


def axis(kind: type[Axis], levels: tuple[float, ...] = (0.5, 1.0), **options) -> Axis:
    return kind(levels, (min(levels), max(levels)), penalty=100.0, **options)


# --- selection by threshold ---------------------------------------------------------------------


def reference_at_least_kth(x_N: np.ndarray, k: int) -> np.ndarray:
    return np.array([sum(other > x for other in x_N) < k for x in x_N])


@quick
@given(st.data())
def test_at_least_kth(data):
    N = data.draw(st.sampled_from([1, 2, 7, 40, 64]))  # 64: counted by lanes
    pool = st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 1.0000001]) | floats
    x_N = np.array(data.draw(st.lists(pool, min_size=N, max_size=N)), np.float32)
    k = data.draw(st.integers(1, N))
    mask_N = np.asarray(jax.jit(at_least_kth)(x_N, jnp.int32(k)))
    np.testing.assert_array_equal(mask_N, reference_at_least_kth(x_N, k))
    assert mask_N.sum() >= k


def test_at_least_kth_of_rows_with_their_own_counts():
    x = np.array([[3.0, 1.0, 3.0, 2.0], [0.0, -0.0, -5.0, 7.0]], np.float32)
    np.testing.assert_array_equal(
        at_least_kth(x, jnp.array([1, 2])), [[True, False, True, False], [True, True, False, True]]
    )


# --- pruning and quantisation -------------------------------------------------------------------


def test_pruning_by_hand():
    x_D = jnp.array([0.5, -3.0, 2.0, -2.0, 0.0])
    np.testing.assert_array_equal(keep_channels(x_D, 0.2), [0, -3, 0, 0, 0])
    np.testing.assert_array_equal(keep_channels(x_D, 0.21), [0, -3, 2, -2, 0])  # ceil(1.05) = 2; a tie
    np.testing.assert_array_equal(keep_channels(x_D, 0.0), [0, -3, 0, 0, 0])  # at least one
    np.testing.assert_array_equal(keep_channels(x_D, 1.0), x_D)


@quick
@given(st.lists(floats, min_size=9, max_size=9), st.floats(0, 1, width=32))
def test_pruning(x_D, fraction):
    x_D = np.array(x_D, np.float32)
    count = min(max(math.ceil(np.float32(fraction) * np.float32(9)), 1), 9)
    kept_D = reference_at_least_kth(np.abs(x_D), count)
    np.testing.assert_array_equal(jax.jit(keep_channels)(x_D, fraction), np.where(kept_D, x_D, 0))


def test_quantisation_by_hand():
    """3 bits: from -3 to 3 steps of 2; halves go to the even neighbour."""
    y_D = jnp.array([6.0, 1.0, -3.0, 5.0, -0.9])
    np.testing.assert_array_equal(fake_quantize(y_D, 3.0), [6, 0, -4, 4, 0])
    np.testing.assert_array_equal(fake_quantize(y_D, 2.0), [6, 0, 0, 6, 0])
    np.testing.assert_array_equal(fake_quantize(y_D, 16.0), y_D)


def reference_fake_quantize(y_D: np.ndarray, bits: int) -> np.ndarray:
    top = np.float32(2 ** (bits - 1) - 1)
    scale = np.maximum(np.abs(y_D).max(), np.float32(1e-8)) / top
    return y_D if bits >= 16 else np.clip(np.round(y_D / scale), -top, top) * scale


@quick
@given(st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=9, max_size=9))
def test_quantisation_is_exact_however_it_is_compiled(y_D):
    y_D = np.array(y_D, np.float32)
    bits_N = np.arange(2, 17)
    expected_NxD = np.stack([reference_fake_quantize(y_D, int(bits)) for bits in bits_N])
    y_NxD = jnp.broadcast_to(y_D, expected_NxD.shape)
    for quantize in (jax.vmap(fake_quantize), fake_quantize, jax.jit(fake_quantize)):
        np.testing.assert_array_equal(quantize(y_NxD, bits_N.astype(np.float32)), expected_NxD)


# --- budgets ------------------------------------------------------------------------------------


def test_budgets_by_hand():
    """float32 0.1 is a little over a tenth; ten of it are one in float32, and more than one exactly."""
    assert float32_ceil(0.1, 10) == 1
    assert exact_ceil(0.1, 10) == 2
    assert float32_ceil(0.1, 151) == exact_ceil(0.1, 151) == 16
    assert exact_ceil(1.0, 131071) == 131071


def test_exact_ceil():
    rng = np.random.default_rng(0)
    decimals = np.arange(2, 101) / 100
    fraction_N = np.concatenate([np.repeat(decimals, 150), rng.uniform(2**-6, 1, 5000)]).astype(np.float32)
    count_N = np.concatenate([rng.integers(0, 200, 7000), rng.integers(0, 2**17, len(fraction_N) - 7000)])
    expected = [math.ceil(Fraction(float(f)) * int(n)) for f, n in zip(fraction_N, count_N, strict=True)]
    np.testing.assert_array_equal(jax.jit(exact_ceil)(fraction_N, count_N), expected)


# --- which keys a step reads --------------------------------------------------------------------

H, G, D_HEAD, CAPACITY = 2, 2, 3, 40


def draw_case(data) -> tuple[float, np.ndarray, np.ndarray, int, int]:
    """kappa, q [H, G, d], k [H, N, d], the number of keys in reach, and how many of them are the prefix."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    largest = data.draw(st.sampled_from([1, 5]))
    q = rng.integers(-largest, largest, (H, G, D_HEAD), endpoint=True).astype(np.float32)
    k = rng.integers(-largest, largest, (H, CAPACITY, D_HEAD), endpoint=True).astype(np.float32)
    num_keys = data.draw(st.integers(2, CAPACITY))
    return data.draw(kappas), q, k, num_keys, data.draw(st.integers(1, num_keys - 1))


def token_budget(kappa: float, count: int) -> int:
    return math.ceil(np.float32(kappa) * np.float32(count))


def reference_quest(kappa, q_d, k_Nxd, page_size) -> np.ndarray:
    return reference_pages(kappa, q_d[None], k_Nxd, page_size)


def reference_pages(kappa, q_Gxd, k_Nxd, page_size) -> np.ndarray:
    """The keys of the pages that are best for some query heads together."""
    pages = [k_Nxd[start : start + page_size] for start in range(0, len(k_Nxd), page_size)]
    # The best logit that any mixture of a page's channels could have.
    score_P = np.array([sum((q_d * page).max(0).sum() for q_d in q_Gxd) for page in pages])
    budget = min(max(token_budget(kappa, len(k_Nxd)), 1), len(k_Nxd))
    kept_P = reference_at_least_kth(score_P, math.ceil(budget / page_size))
    return np.array([kept_P[i // page_size] for i in range(len(k_Nxd))])


def reference_recency(kappa, num_keys, sinks, window) -> np.ndarray:
    rest = num_keys - (sinks + window + 1)
    recent = window + 1 + math.ceil(Fraction(float(np.float32(kappa))) * max(rest, 0))
    return np.array([rest <= 0 or i < sinks or i >= num_keys - recent for i in range(num_keys)])


def reference_relevancy(kappa, q_d, k_Nxd, sinks, window) -> np.ndarray:
    N = len(k_Nxd)
    free = [i for i in range(N) if sinks <= i < N - (window + 2)]
    logit_N = k_Nxd @ q_d
    count = max(token_budget(kappa, len(free)), 1)
    better = [sum(logit_N[j] > logit_N[i] for j in free) for i in range(N)]
    return np.array([i not in free or better[i] < count for i in range(N)])


def assert_attends(kind: Axis, case, reference) -> None:
    """`reference(kappa, q_d, k_Nxd)` gives the mask of one query head over the keys in reach."""
    kappa, q, k, num_keys, prefix_len = case
    mask = np.asarray(attended(kind, kappa, q, k, num_keys, prefix_len))
    assert not mask[..., num_keys:].any()
    for h, g in itertools.product(range(H), range(G)):
        expected_N = reference(kappa, q[h, g], k[h, :num_keys])
        np.testing.assert_array_equal(mask[h, g, :num_keys], expected_N, err_msg=f"head {h}, {g}")


@pytest.mark.parametrize("page_size", [1, 3, 8, 16])
def test_quest(page_size):
    quest = axis(Quest, page_size=page_size)

    @quick
    @given(st.data())
    def check(data):
        assert_attends(quest, draw_case(data), lambda *row: reference_quest(*row, page_size))

    check()


@quick
@given(st.data())
def test_pages_of_a_group(data):
    """Not Quest: the query heads of a key/value head share the pages of the highest summed score."""
    kappa, q, k, num_keys, prefix_len = draw_case(data)
    mask = np.asarray(attended(axis(Quest, heads="group"), kappa, q, k, num_keys, prefix_len))
    for h in range(H):
        expected_N = reference_pages(kappa, q[h], k[h, :num_keys], 8)
        np.testing.assert_array_equal(mask[h, :, :num_keys], np.tile(expected_N, (G, 1)))


@quick
@given(st.data())
def test_protected_quest(data):
    """The sinks and the recent window on top of the pages."""

    def reference(kappa, q_d, k_Nxd):
        N = len(k_Nxd)
        always = [i < 4 or i >= N - 3 for i in range(N)]
        return reference_quest(kappa, q_d, k_Nxd, 8) | always

    assert_attends(axis(Quest, page_size=8, protect=True), draw_case(data), reference)


def reference_original_quest(kappa, q_d, k_Nxd, page_size, least) -> np.ndarray:
    """The newest page is read and counted; of the others as many as are left are the best."""
    pages = [k_Nxd[start : start + page_size] for start in range(0, len(k_Nxd), page_size)]
    score_P = np.array([(q_d * page).max(0).sum() for page in pages])
    budget = min(max(token_budget(kappa, len(k_Nxd)), 1), len(k_Nxd))
    others = max(math.ceil(budget / page_size), least) - 1
    kept_P = [*(reference_at_least_kth(score_P[:-1], min(others, len(pages) - 1)) if others else ()), True]
    kept_P = [False] * (len(pages) - len(kept_P)) + kept_P
    return np.array([kept_P[i // page_size] for i in range(len(k_Nxd))])


@pytest.mark.parametrize(("page_size", "least"), [(1, 1), (4, 3), (8, 1), (8, 3)])
def test_the_original_quests_newest_and_least_pages(page_size, least):
    quest = axis(Quest, page_size=page_size, read_newest=True, least_pages=least)

    @quick
    @given(st.data())
    def check(data):
        assert_attends(quest, draw_case(data), lambda *row: reference_original_quest(*row, page_size, least))

    check()


def test_the_original_quests_first_layers_are_dense():
    """Layers below `dense_layers` read every page, the others what their budget allows."""
    quest = axis(Quest, page_size=2, dense_layers=2)
    keys = KeysInReach(jnp.zeros((1, 8, 1)), jnp.zeros((1, 2, 1)), jnp.int32(8), jnp.int32(0))
    prefix = jnp.arange(8.0).reshape(1, 8, 1)
    keys = keys._replace(prefix_HxSxd=prefix)
    index = jnp.stack([quest.index_prefix(prefix)] * 3)
    suffix = quest.index_token(quest.index_suffix(index[0], keys), jnp.zeros((1, 1)), keys)
    q = jnp.ones((1, 1, 1))
    read = [
        int(quest.keep_pages(jnp.float32(0.2), q, keys, index, suffix, jnp.int32(layer))[0].sum())
        for layer in range(3)
    ]
    assert read == [4, 4, 1]


@pytest.mark.parametrize(("sinks", "window"), [(4, 2), (0, 0), (16, 16)])
def test_recency_and_relevancy(sinks, window):
    ends = {"sinks": sinks, "window": window}

    @quick
    @given(st.data())
    def check(data):
        case = draw_case(data)
        assert_attends(
            axis(Recency, **ends), case, lambda kappa, q, k: reference_recency(kappa, len(k), sinks, window)
        )
        assert_attends(axis(Relevancy, **ends), case, lambda *row: reference_relevancy(*row, sinks, window))

    check()


def test_quest_by_hand():
    """Pages of two keys in one channel: their best logits with q = -1 are 5, 1, 4 and, the last alone, -3."""
    k_1xNx1 = np.array([[[-5], [9], [0], [-1], [-4], [2], [3]]], np.float32)
    q_1x1x1 = np.full((1, 1, 1), -1, np.float32)
    quest = axis(Quest, page_size=2)

    def kept(kappa):
        return np.flatnonzero(attended(quest, kappa, q_1x1x1, k_1xNx1, 7, 3)).tolist()

    assert kept(0.1) == [0, 1]  # 1 token, 1 page; not the current token's own
    assert kept(0.3) == [0, 1, 4, 5]  # ceil(2.1) = 3 tokens, 2 pages
    assert kept(0.8) == [0, 1, 2, 3, 4, 5]  # 6 tokens, 3 pages
    assert kept(0.9) == kept(1.0) == [0, 1, 2, 3, 4, 5, 6]


@functools.partial(jax.jit, static_argnames="quest")
def grow_bounds(quest: Quest, prefix: jax.Array, suffix: jax.Array, prefix_len: int, num_steps: int):
    """Quest's index of the suffix after `num_steps` tokens."""
    keys = KeysInReach(prefix, suffix, prefix_len, jnp.int32(0))

    def add(step, index):
        return quest.index_token(index, suffix[:, step], keys._replace(step=step))

    return jax.lax.fori_loop(0, num_steps, add, quest.index_suffix(quest.index_prefix(prefix), keys))


@quick
@given(st.integers(1, 20), st.integers(1, 12), st.sampled_from([1, 3, 8]), st.integers(0, 99))
def test_bounds_grow_token_by_token(prefix_len, num_steps, page_size, seed):
    """What the tokens of an episode add one by one is what their pages have as a whole."""
    k_HxNxd = np.random.default_rng(seed).normal(size=(H, 32, D_HEAD)).astype(np.float32)
    prefix, suffix = k_HxNxd[:, :20], k_HxNxd[:, prefix_len : prefix_len + 12]
    grown = grow_bounds(axis(Quest, page_size=page_size), prefix, suffix, prefix_len, num_steps)
    whole = page_bounds(k_HxNxd, np.arange(32) < prefix_len + num_steps, page_size)
    first = prefix_len // page_size
    begun = -(-(prefix_len + num_steps) // page_size) - first
    np.testing.assert_array_equal(grown[:, :begun], whole[:, first : first + begun])
    largest, smallest = np.split(np.asarray(grown[:, begun:]), 2, -1)
    assert (largest == -np.inf).all()
    assert (smallest == np.inf).all()


def test_axes_choose_no_keys_unless_they_say_so():
    k, q = np.zeros((1, 5, 2), np.float32), np.zeros((1, 1, 2), np.float32)
    for kind in (Axis, ChannelPruning, OutputQuantization):
        np.testing.assert_array_equal(attended(axis(kind), 0.5, q, k, 4, 2)[0, 0], [1, 1, 1, 1, 0])


# --- joint actions ------------------------------------------------------------------------------

JOINT = ActionSpace(
    (
        axis(Quest, (0.1, 0.4, 1.0)),
        axis(ChannelPruning, (0.45, 0.9)),
        axis(OutputQuantization, (5, 8, 12, 16)),
    )
)


def test_actions_by_hand():
    assert JOINT.num_actions == 24
    np.testing.assert_array_equal(
        JOINT.values_AxX[[0, 1, 4]], np.float32([[0.1, 0.45, 5], [0.1, 0.45, 8], [0.1, 0.9, 5]])
    )
    np.testing.assert_array_equal(JOINT.values_AxX[JOINT.dense], np.float32([1.0, 0.9, 16]))
    # A share of the full cost: pruning's of its top level, quantisation's of 16 bits.
    np.testing.assert_array_equal(JOINT.costs_AxX[[0, 9]], np.float32([[0.1, 0.5, 0.3125], [0.4, 0.5, 0.5]]))


def test_join_finds_every_action():
    sizes = [len(a.levels) for a in JOINT.axes]
    level_AxX = np.array(list(itertools.product(*map(range, sizes))))
    np.testing.assert_array_equal(JOINT.join(level_AxX), np.arange(JOINT.num_actions))
    for action, level_X in enumerate(level_AxX):
        value_X = [a.levels[i] for a, i in zip(JOINT.axes, level_X, strict=True)]
        np.testing.assert_array_equal(JOINT.values_AxX[action], np.float32(value_X))


def test_paper_has_1560_actions():
    kappa = np.arange(1, 11) / 10
    rho = np.arange(40, 101, 5) / 100
    space = ActionSpace(
        (
            axis(Quest, tuple(kappa)),
            axis(ChannelPruning, tuple(rho)),
            axis(OutputQuantization, tuple(range(5, 17))),
        )
    )
    assert space.num_actions == 1560
    np.testing.assert_array_equal(space.costs_AxX[space.dense], [1, 1, 1])


def test_axis_without_a_choice_is_not_penalised():
    assert axis(Quest, (0.5, 1.0)).penalty_weight == 100.0
    assert axis(Quest, (1.0,)).penalty_weight == 0.0
