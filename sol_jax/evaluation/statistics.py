"""Intervals and tests that respect how the data were drawn."""

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np

NUM_RESAMPLES = 2000


def document_bootstrap(
    value_N: np.ndarray, document_N: np.ndarray, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of `value_N` with a percentile bootstrap interval over *documents*.

    Blocks of one document resemble each other, so whole documents are resampled, each with all its
    blocks.  Returns (mean, low, high); with a single document the interval is (nan, nan): one document
    says nothing about others.
    """
    names, index_N = np.unique(document_N, return_inverse=True)
    total_G = np.bincount(index_N, value_N)
    count_G = np.bincount(index_N)
    mean = float(np.mean(value_N))
    if len(names) < 2:
        return mean, float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(len(names), size=(NUM_RESAMPLES, len(names)))
    means = total_G[draws].sum(1) / count_G[draws].sum(1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return mean, float(low), float(high)


def document_correlation(
    x_N: np.ndarray, y_N: np.ndarray, document_N: np.ndarray, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Pearson's correlation with a percentile bootstrap interval over documents.

    Returns (r, low, high); nan where it does not exist: of a constant, or the interval of one document.
    """
    names, index_N = np.unique(document_N, return_inverse=True)
    # Centred, so that the sums of squares below do not cancel; r does not change.
    x_N, y_N = x_N - np.mean(x_N), y_N - np.mean(y_N)
    products = (np.ones(len(x_N)), x_N, y_N, x_N * x_N, y_N * y_N, x_N * y_N)
    total_Gx6 = np.stack([np.bincount(index_N, product) for product in products], -1)
    r = float(_correlation(total_Gx6.sum(0)))
    if len(names) < 2:
        return r, float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(len(names), size=(NUM_RESAMPLES, len(names)))
    resampled = _correlation(total_Gx6[draws].sum(1))
    tail = (1 - level) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail]) if np.isfinite(resampled).any() else (np.nan,) * 2
    return r, float(low), float(high)


def _correlation(sums: np.ndarray) -> np.ndarray:
    """Pearson's r from the sums of 1, x, y, x^2, y^2 and xy, [..., 6]; nan without variance."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = (n * xx - x * x) * (n * yy - y * y)
    # Rounding leaves a constant some 1e-16 of variance, relative to its squares.
    exists = spread > 1e-18 * (n * xx) * (n * yy)
    return np.where(exists, (n * xy - x * y) / np.sqrt(np.where(exists, spread, 1.0)), np.nan)


def wilson(successes: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, which stays within 0 and 1 (JASA 22, 1927)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(first_N: np.ndarray, second_N: np.ndarray) -> float:
    """Two-sided p-value of two controllers being right as often, on the same items: McNemar's exact test.

    Only items on which they differ tell; if neither is better, each of these is a fair coin's.
    """
    first_N, second_N = np.asarray(first_N, bool), np.asarray(second_N, bool)
    wins, losses = int(np.sum(first_N & ~second_N)), int(np.sum(second_N & ~first_N))
    differ = wins + losses
    tail = sum(math.comb(differ, k) for k in range(min(wins, losses) + 1))
    # Whole numbers, for 2**differ exceeds a float beyond a thousand items.
    return min(1.0, float(Fraction(2 * tail, 2**differ)))
