"""Linear datamodeling score: are the losses of models retrained on random subsets in the order that scores predict?

Park, Georgiev, Ilyas, Leclerc, Madry: "TRAK: Attributing Model Behavior at Scale", ICML 2023.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

SUBSETS = 2**34  # Philox key, apart from those of other draws


def subset(num_samples: int, fraction: float, *, seed: int, index: int) -> npt.NDArray[np.int64]:
    """Ids of one random subset, ascending; a function of (seed, index) alone, so that more subsets keep the first ones."""
    draws = np.random.Generator(np.random.Philox(key=[seed, SUBSETS + index]))
    size = min(max(round(fraction * num_samples), 1), num_samples - 1)
    return np.sort(draws.choice(num_samples, size, replace=False))


class Correlation(NamedTuple):
    """Spearman's correlation over subsets with its 95 % interval (Fisher's z)."""

    value: float
    low: float
    high: float


def lds(predicted_M: npt.NDArray[np.floating], found_M: npt.NDArray[np.floating]) -> Correlation:
    """LDS of one query.

    Args:
        predicted_M: For each of M subsets the sum of its samples' scores, with the sign that a larger one predicts a
            larger loss: of influence and all scores whose large values are helpful, minus the sum.
        found_M: The loss on the query of models trained on each subset, mean over seeds.

    Returns:
        NaN where one of them is constant.
    """
    if np.ptp(predicted_M) == 0 or np.ptp(found_M) == 0:
        return Correlation(np.nan, np.nan, np.nan)
    # Spearman's correlation is Pearson's of the ranks, and that one comes with an interval.
    found = stats.pearsonr(stats.rankdata(predicted_M), stats.rankdata(found_M))
    low, high = found.confidence_interval() if len(found_M) > 3 else (np.nan, np.nan)
    return Correlation(float(found.statistic), float(low), float(high))
