"""The bootstrap over documents, against every possible resample and against known truths."""

import itertools

import numpy as np
import pytest

from sol_jax.statistics import document_bootstrap


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
