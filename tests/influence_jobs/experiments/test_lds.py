"""Subsets and linear datamodeling scores."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from influence_jobs.experiments.lds import lds, subset


def test_subsets_are_halves_that_depend_on_seed_and_index_alone() -> None:
    found = [subset(1001, 0.5, seed=3, index=i) for i in range(200)]
    assert {len(ids) for ids in found} == {500}
    assert all((np.diff(ids) > 0).all() for ids in found)
    assert (subset(1001, 0.5, seed=3, index=7) == found[7]).all()
    assert (subset(1001, 0.5, seed=4, index=7) != found[7]).any()
    often = np.bincount(np.concatenate(found), minlength=1001)
    assert often.min() > 60  # each sample is in about half of the 200
    assert often.max() < 140


def test_a_subset_is_never_empty_nor_everything() -> None:
    assert len(subset(4, 0.01, seed=0, index=0)) == 1
    assert len(subset(4, 0.99, seed=0, index=0)) == 3


def test_it_is_spearmans_correlation_with_an_interval() -> None:
    predicted, noise = np.random.default_rng(0).normal(size=(2, 60))
    found = lds(predicted, np.exp(predicted + noise))
    assert found.value == pytest.approx(spearmanr(predicted, predicted + noise).statistic)
    assert found.low < found.value < found.high
    assert lds(predicted, -predicted).value == pytest.approx(-1)


def test_what_never_changes_has_no_correlation() -> None:
    assert np.isnan(lds(np.zeros(5), np.arange(5.0)).value)
    assert np.isnan(lds(np.arange(5.0), np.zeros(5)).value)
