"""Linear datamodeling score (LDS).

Models are retrained on random subsets of the training set. The LDS is the rank correlation of their
losses with the losses that scores predict.

Park, Georgiev, Ilyas, Leclerc, Madry: "TRAK: Attributing Model Behavior at Scale", ICML 2023.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from influence_jobs.experiments.intervals import LEVEL, Interval, no_warning_of_ties

RESAMPLES = 499  # few, since each of them ranks the values of all queries anew


def subset(num_samples: int, fraction: float, index: int) -> npt.NDArray[np.int64]:
    """Ids of one random subset, ascending.

    They depend on the index only, so a run with more subsets keeps the first ones.
    """
    # The third word of the counter keeps this stream apart from all others.
    draws = np.random.Generator(np.random.Philox(key=index, counter=[0, 0, 2, 0]))
    size = min(max(round(fraction * num_samples), 1), num_samples - 1)
    return np.sort(draws.choice(num_samples, size, replace=False))


class Ceiling(NamedTuple):
    """What no method can pass, because the retrained losses have noise of their seeds.

    Attributes:
        agreement: Spearman's correlation over subsets of the losses from two seeds, mean over
            queries and pairs of seeds.
        value: The root of the reliability of the mean over seeds (Spearman 1910, Brown 1910), which
            is the correlation of that mean with the mean over infinitely many.
        low, high: The 95 % interval of `value`, of the percentile bootstrap over subsets.
    """

    agreement: float
    value: float
    low: float
    high: float

    @property
    def words(self) -> str:
        """The ceiling in a sentence."""
        return (
            f"No method can pass {self.value:.2f} ({self.low:.2f} to {self.high:.2f}): losses from "
            f"two seeds of one subset correlate at {self.agreement:.2f}."
        )


def ceiling(found_MSQ: npt.NDArray[np.floating]) -> Ceiling:
    """The ceiling of the mean LDS, from the agreement of seeds.

    Args:
        found_MSQ: For each of M subsets the losses of models from S >= 2 seeds, on Q queries.

    Returns:
        The ceiling; NaN if no query has losses that change.
    """
    seeds = found_MSQ.shape[1]
    # Ranked once: resampled subsets keep their ranks, as ranking them anew takes a minute.
    ranks_MSQ = stats.rankdata(found_MSQ, axis=0)

    def agreement(subsets: npt.NDArray[np.int64]) -> float:
        ranks = ranks_MSQ[subsets] - ranks_MSQ[subsets].mean(axis=0)
        sizes_SQ = np.sqrt((ranks * ranks).sum(axis=0))
        there = (sizes_SQ > 0).all(axis=0)
        sums_MQ = (ranks[..., there] / sizes_SQ[:, there]).sum(axis=1)
        pairs_Q = ((sums_MQ**2).sum(axis=0) - seeds) / (seeds * (seeds - 1))
        return float(pairs_Q.mean()) if there.any() else np.nan

    def reached(subsets: npt.NDArray[np.int64]) -> float:
        alone = max(agreement(subsets), 0.0)
        return float(np.sqrt(seeds * alone / (1 + (seeds - 1) * alone)))

    everything = np.arange(len(found_MSQ))
    if np.isnan(alone := agreement(everything)):
        return Ceiling(np.nan, np.nan, np.nan, np.nan)
    return Ceiling(alone, *_resampled(reached, len(found_MSQ)))


class Correlation(NamedTuple):
    """Spearman's correlation over subsets, with its 95 % interval (Fisher's z)."""

    value: float
    low: float
    high: float


def mean_lds(
    predicted_QM: npt.NDArray[np.floating], found_QM: npt.NDArray[np.floating]
) -> Interval:
    """The mean LDS of Q queries, with the interval of the percentile bootstrap over M subsets.

    All queries share the subsets and trainings, so subsets are resampled, not queries. Queries
    without a correlation do not count. For the arguments see `lds`.
    """
    return _resampled(lambda subsets: _mean_lds(predicted_QM, found_QM, subsets), found_QM.shape[1])


def mean_difference(
    predicted_QM: npt.NDArray[np.floating],
    others_QM: npt.NDArray[np.floating],
    found_QM: npt.NDArray[np.floating],
) -> Interval:
    """How much larger the mean LDS of a method is than another's, with the interval of both.

    Both are measured on the same resampled subsets, so what they have in common cancels out. For
    the arguments see `lds`.
    """

    def difference(subsets: npt.NDArray[np.int64]) -> float:
        one = _mean_lds(predicted_QM, found_QM, subsets)
        return one - _mean_lds(others_QM, found_QM, subsets)

    return _resampled(difference, found_QM.shape[1])


def _mean_lds(
    predicted_QM: npt.NDArray[np.floating],
    found_QM: npt.NDArray[np.floating],
    subsets: npt.NDArray[np.int64],
) -> float:
    """The mean over queries of Spearman's correlation over some subsets; NaN if none has one."""
    # Of all queries at once, as Pearson's of the ranks.
    ranks = [stats.rankdata(x[:, subsets], axis=1) for x in (predicted_QM, found_QM)]
    a, b = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    sizes = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    there = sizes > 0
    return float(np.mean((a * b).sum(axis=1)[there] / sizes[there])) if there.any() else np.nan


def _resampled(statistic: Callable[[npt.NDArray[np.int64]], float], num_subsets: int) -> Interval:
    subsets = np.arange(num_subsets)
    if np.isnan(value := statistic(subsets)):
        return Interval(np.nan, np.nan, np.nan)
    with no_warning_of_ties():
        found = stats.bootstrap(
            (subsets,),
            statistic,
            vectorized=False,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def lds(predicted_M: npt.NDArray[np.floating], found_M: npt.NDArray[np.floating]) -> Correlation:
    """LDS of one query.

    Args:
        predicted_M: For each of M subsets the sum of its samples' scores, with a sign such that a
            larger value predicts a larger loss. For scores whose large values are helpful, such as
            influence, that is minus the sum.
        found_M: The loss on the query of the models trained on each subset, averaged over seeds.

    Returns:
        The correlation; NaN if either argument is constant.
    """
    if np.ptp(predicted_M) == 0 or np.ptp(found_M) == 0:
        return Correlation(np.nan, np.nan, np.nan)
    # Spearman's correlation is Pearson's of the ranks, for which scipy gives an interval.
    found = stats.pearsonr(stats.rankdata(predicted_M), stats.rankdata(found_M))
    low, high = found.confidence_interval() if len(found_M) > 3 else (np.nan, np.nan)
    return Correlation(float(found.statistic), float(low), float(high))
