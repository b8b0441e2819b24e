"""Subsets and linear datamodeling scores."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from influence_jobs.experiments.lds import lds, mean_lds, subset


def test_subsets_are_halves_that_depend_on_their_index_alone() -> None:
    found = [subset(1001, 0.5, i) for i in range(200)]
    assert {len(ids) for ids in found} == {500}
    assert all((np.diff(ids) > 0).all() for ids in found)
    assert (subset(1001, 0.5, 7) == found[7]).all()
    often = np.bincount(np.concatenate(found), minlength=1001)
    assert often.min() > 60  # each sample is in about half of the 200
    assert often.max() < 140


def test_a_subset_is_never_empty_nor_everything() -> None:
    assert len(subset(4, 0.01, 0)) == 1
    assert len(subset(4, 0.99, 0)) == 3


def test_it_is_spearmans_correlation_with_an_interval() -> None:
    predicted, noise = np.random.default_rng(0).normal(size=(2, 60))
    found = lds(predicted, np.exp(predicted + noise))
    assert found.value == pytest.approx(spearmanr(predicted, predicted + noise).statistic)
    assert found.low < found.value < found.high
    assert lds(predicted, -predicted).value == pytest.approx(-1)


def test_what_never_changes_has_no_correlation() -> None:
    assert np.isnan(lds(np.zeros(5), np.arange(5.0)).value)
    assert np.isnan(lds(np.arange(5.0), np.zeros(5)).value)


def test_the_mean_over_queries_has_an_interval_over_subsets() -> None:
    draws = np.random.default_rng(0)
    common = draws.normal(size=80)  # shared by all queries, as the noise of retrainings is
    predicted = draws.normal(size=(30, 80))
    found = 0.5 * predicted + common + 0.1 * draws.normal(size=(30, 80))
    expected = np.mean([lds(p, f).value for p, f in zip(predicted, found, strict=True)])
    mean = mean_lds(predicted, found)
    assert mean.mean == pytest.approx(expected)
    assert mean.low < mean.mean < mean.high
    alone = mean_lds(predicted[:, :20], found[:, :20])
    assert alone.high - alone.low > 1.3 * (
        mean.high - mean.low
    )  # fewer subsets give a wider interval


def test_queries_without_a_correlation_do_not_count() -> None:
    predicted = np.array([[1.0, 2, 3, 4, 5], [0, 0, 0, 0, 0]])
    assert mean_lds(predicted, np.array([[1.0, 2, 3, 4, 5]] * 2)).mean == pytest.approx(1)
    assert np.isnan(mean_lds(predicted[1:], predicted[:1]).mean)
