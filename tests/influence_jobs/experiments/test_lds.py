"""Subsets and linear datamodeling scores."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from influence_jobs.experiments.lds import ceiling, lds, mean_difference, mean_lds, subset


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


def test_the_interval_of_one_query_is_fishers() -> None:
    predicted, found = np.random.default_rng(0).normal(size=(2, 28))
    one = lds(predicted, found)
    half = 1.959964 / np.sqrt(28 - 3)
    expected = np.tanh(np.arctanh(one.value) + np.array([-half, half]))
    assert (one.low, one.high) == pytest.approx(tuple(expected), rel=1e-5)
    assert not np.isnan(lds(predicted[:4], found[:4]).low)
    few = lds(predicted[:3], found[:3])  # three points leave nothing to an interval
    assert np.isnan([few.low, few.high]).all()
    assert not np.isnan(few.value)


def test_the_interval_of_the_mean_holds_its_share_of_resamples() -> None:
    draws = np.random.default_rng(3)
    predicted = draws.normal(size=(3, 50))
    found = predicted + draws.normal(size=(3, 50))
    mean = mean_lds(predicted, found)
    resampled = []
    for _ in range(600):
        chosen = draws.integers(50, size=50)
        pairs = zip(predicted[:, chosen], found[:, chosen], strict=True)
        resampled.append(np.mean([spearmanr(*pair).statistic for pair in pairs]))
    assert (mean.low, mean.high) == pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=0.05)


def test_subsets_are_the_ones_that_stored_runs_were_trained_on() -> None:
    """Weights are kept by the samples they were trained on: other draws would train all anew."""
    assert subset(20, 0.25, 0).tolist() == [6, 9, 14, 16, 17]
    assert subset(20, 0.25, 3).tolist() == [0, 2, 8, 18, 19]


def test_a_difference_is_surer_than_what_it_is_of() -> None:
    draws = np.random.default_rng(0)
    found = draws.normal(size=(5, 60))
    worse = found + draws.normal(size=(5, 60))
    better = worse - 0.2 * (worse - found)  # the same errors, smaller
    difference = mean_difference(better, worse, found)
    one, other = mean_lds(better, found), mean_lds(worse, found)
    assert difference.mean == pytest.approx(one.mean - other.mean)
    assert 0 < difference.low < difference.mean < difference.high
    assert difference.high - difference.low < 0.5 * (other.high - other.low)
    assert mean_difference(worse, worse, found) == (0, 0, 0)


def test_the_ceiling_is_what_a_perfect_prediction_reaches() -> None:
    draws = np.random.default_rng(0)
    truth = draws.normal(size=(400, 20))
    found = truth[:, None] + draws.normal(size=(400, 3, 20))
    limit = ceiling(found)
    reached = mean_lds(truth.T, found.mean(axis=1).T).mean
    assert limit.value == pytest.approx(reached, abs=0.02)
    assert limit.low < limit.value < limit.high
    pairs = [(a, b) for a in range(3) for b in range(a)]
    agree = [
        spearmanr(found[:, a, q], found[:, b, q]).statistic for a, b in pairs for q in range(20)
    ]
    assert limit.agreement == pytest.approx(np.mean(agree))
    more = ceiling(truth[:, None] + draws.normal(size=(400, 6, 20)))
    assert more.value > limit.value + 0.03
    assert more.agreement == pytest.approx(limit.agreement, abs=0.03)


def test_seeds_that_do_not_agree_allow_nothing() -> None:
    limit = ceiling(np.random.default_rng(1).normal(size=(50, 2, 40)))
    assert limit.value < 0.3
    assert ceiling(np.stack([np.arange(9.0)] * 2, axis=1)[:, :, None]).value == pytest.approx(1)
    opposed = np.stack([np.arange(9.0), -np.arange(9.0)], axis=1)[:, :, None]
    assert ceiling(opposed).value == 0
    assert np.isnan(ceiling(np.ones((9, 2, 3))).value)


def test_four_subsets_have_no_interval_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Some of their resamples have all subsets alike, and so no correlation."""
    rng = np.random.default_rng(0)
    found = mean_lds(rng.normal(size=(1, 4)), rng.normal(size=(1, 4)))
    assert np.isfinite(found.mean)
    assert np.isnan(found.low)
    assert not recwarn.list
