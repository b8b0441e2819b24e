"""Means with bootstrap intervals."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval; the bounds of a single value are NaN."""

    mean: float
    low: float
    high: float


@contextmanager
def no_warning_of_ties() -> Iterator[None]:
    """Values of which too many are equal have no interval: its NaN says it, no warning need."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        yield


def mean_interval(values: npt.NDArray[np.floating]) -> Interval:
    """The mean of independent values, with the interval of the BCa bootstrap (Efron 1987).

    With about ten skewed values the interval covers the mean less often than it claims.

    Args:
        values: (n,), finite and independent. Average several values of one query first.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, np.nan, np.nan)
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    with no_warning_of_ties():
        found = stats.bootstrap(
            (values,),
            np.mean,
            confidence_level=LEVEL,
            method="BCa",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))
