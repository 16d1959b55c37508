"""The bootstrap over documents, against every resample and known truths; shares and paired tests by hand."""

import itertools

import numpy as np
import pytest

from sol_jax.evaluation.statistics import document_bootstrap, document_correlation, mcnemar, wilson


def test_against_all_resamples():
    """Three documents of 1, 2 and 3 blocks have 27 resamples; the interval's ends are quantiles of them."""
    values = [np.array([1.0]), np.array([2.0, 4.0]), np.array([0.0, 3.0, 9.0])]
    means = [np.concatenate(draw).mean() for draw in itertools.product(values, repeat=3)]
    document_N = np.repeat([7, 3, 5], [1, 2, 3])
    mean, low, high = document_bootstrap(np.concatenate(values), document_N, level=0.5)
    assert mean == pytest.approx(19 / 6)  # of the blocks, not of the documents' means
    below, above = np.sort(means)[[5, 8]], np.sort(means)[[18, 21]]
    assert below[0] <= low <= below[1]
    assert above[0] <= high <= above[1]


def test_a_single_document_says_nothing_of_others():
    mean, low, high = document_bootstrap(np.array([1.0, 3.0]), np.array([4, 4]))
    assert mean == 2.0
    assert np.isnan(low)
    assert np.isnan(high)


def test_a_constant_has_no_width():
    assert document_bootstrap(np.full(6, 2.5), np.arange(6)) == (2.5, 2.5, 2.5)


def test_the_order_and_the_names_of_documents_do_not_matter():
    rng = np.random.default_rng(0)
    value_N, document_N = rng.normal(size=40), np.repeat(np.arange(8), 5)
    order = rng.permutation(40)
    expected = document_bootstrap(value_N, document_N)
    np.testing.assert_allclose(document_bootstrap(value_N[order], document_N[order] * 10 + 3), expected)


def test_coverage_where_blocks_of_a_document_are_alike():
    """95 % intervals over documents hold the truth about as often; over blocks they would not."""
    rng, hits, naive_hits, runs = np.random.default_rng(1), 0, 0, 200
    document_N = np.repeat(np.arange(40), 6)
    for run in range(runs):
        value_N = rng.normal(size=40)[document_N] + 0.3 * rng.normal(size=240)
        _, low, high = document_bootstrap(value_N, document_N, seed=run)
        hits += low <= 0 <= high
        _, low, high = document_bootstrap(value_N, np.arange(240), seed=run)
        naive_hits += low <= 0 <= high
    assert 0.88 <= hits / runs <= 0.99
    assert naive_hits / runs < 0.75


def test_correlation_by_hand():
    """(1, 2), (2, 1), (3, 4), (4, 3): deviations' products sum to 3, their squares to 5 and 5."""
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 4.0, 3.0])
    r, low, high = document_correlation(x, y, np.arange(4))
    assert r == pytest.approx(3 / 5)
    assert -1 <= low <= r <= high <= 1
    assert document_correlation(x, -10 * y + 7, np.arange(4))[0] == pytest.approx(-3 / 5)
    assert document_correlation(x + 1e6, 1e-6 * y, np.arange(4))[0] == pytest.approx(3 / 5)


def test_correlation_against_all_resamples():
    """Two documents: both of one, both of the other, or one of each, in the shares 1 : 1 : 2."""
    x, y = np.array([0.0, 1.0, 2.0, 0.0, 1.0, 2.0]), np.array([0.0, 1.0, 2.0, 2.0, 1.0, 0.0])
    documents = np.array([0, 0, 0, 1, 1, 1])
    assert document_correlation(x, y, documents) == pytest.approx((0.0, -1.0, 1.0))
    assert document_correlation(x, y, documents, level=0.3) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


def test_correlations_that_do_not_exist():
    x, documents = np.arange(6.0), np.arange(6)
    for constant in (0.0, 0.1, 1e6):
        assert np.isnan(document_correlation(x, np.full(6, constant), documents)).all()
    r, low, high = document_correlation(x, 2 * x, np.zeros(6, int))
    assert r == pytest.approx(1.0)
    assert np.isnan([low, high]).all()


def test_coverage_of_the_correlation():
    """95 % intervals hold the truth about as often where documents share part of both variables."""
    rng, hits, runs, rho = np.random.default_rng(2), 0, 200, 0.5
    document_N = np.repeat(np.arange(50), 8)
    for run in range(runs):
        shared, own = rng.normal(size=(2, 50))[:, document_N], rng.normal(size=(2, 400))
        first, second = (shared + own) / np.sqrt(2)
        hits += (
            np.diff(
                np.sign(
                    np.array(
                        document_correlation(
                            first, rho * first + np.sqrt(1 - rho**2) * second, document_N, seed=run
                        )[1:]
                    )
                    - rho
                )
            )[0]
            == 2
        )
    assert 0.88 <= hits / runs <= 0.99


def test_wilson_by_hand():
    """The ends are the shares p at which the observed one is z standard errors away: roots of a quadratic."""
    for successes, count in ((3, 10), (150, 200)):
        for end in wilson(successes, count):
            assert abs(successes / count - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / count))
    low, high = wilson(0, 4, level=0.6826895)  # z = 1: p = (1 - p) / 4
    assert (low, high) == pytest.approx((0.0, 0.2), abs=1e-6)
    assert wilson(4, 4, level=0.6826895) == pytest.approx((0.8, 1.0), abs=1e-6)


def test_mcnemar_by_hand():
    """Five items that differ, four of them one way: 2 (1 + 5) / 32."""
    first = np.array([1, 1, 1, 1, 0, 1, 0, 0])
    second = np.array([0, 0, 0, 0, 1, 1, 0, 0])
    assert mcnemar(first, second) == pytest.approx(12 / 32)
    assert mcnemar(second, first) == mcnemar(first, second)
    assert mcnemar(first, first) == 1.0
    assert mcnemar(np.ones(7), np.zeros(7)) == pytest.approx(2 / 128)
    assert mcnemar(np.arange(3000) % 2, np.arange(3000) % 2 == 0) == 1.0
