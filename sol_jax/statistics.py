"""Intervals that respect how the data were drawn."""

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
