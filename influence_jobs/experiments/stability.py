"""Stability: the similarity of two rankings of the same samples."""

import numpy as np
import numpy.typing as npt
from scipy import stats


def head(scores_N: npt.NDArray[np.floating], k: int, *, largest: bool) -> npt.NDArray[np.int64]:
    """Ids of the k largest or smallest scores, best first, ties by id; NaN is left out."""
    there = np.flatnonzero(~np.isnan(scores_N))
    keys = -scores_N[there] if largest else scores_N[there]
    return there[np.argsort(keys, kind="stable")[:k]]


def overlap(
    a_N: npt.NDArray[np.floating], b_N: npt.NDArray[np.floating], k: int, *, largest: bool
) -> float:
    """The share (0 to 1) of the k best samples that two rankings have in common.

    For independent rankings of N samples k / N is expected.
    """
    return len(np.intersect1d(head(a_N, k, largest=largest), head(b_N, k, largest=largest))) / k


def rank_correlation(a_N: npt.NDArray[np.floating], b_N: npt.NDArray[np.floating]) -> float:
    """Spearman's correlation over the samples that have both scores; NaN if one is constant."""
    both = ~(np.isnan(a_N) | np.isnan(b_N))
    if both.sum() < 2 or np.ptp(a_N[both]) == 0 or np.ptp(b_N[both]) == 0:
        return float("nan")
    return float(stats.spearmanr(a_N[both], b_N[both]).statistic)
