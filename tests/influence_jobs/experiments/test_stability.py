"""Overlap and rank correlation, compared with sets and ranks taken by hand."""

import numpy as np
import pytest
from scipy.stats import rankdata

from influence_jobs.experiments.stability import head, overlap, rank_correlation

NAN = float("nan")


def test_the_head_is_best_first_with_ties_by_id_and_without_samples_left_out() -> None:
    scores = np.array([2.0, NAN, 5, 2, -1, 5])
    assert head(scores, 3, largest=True).tolist() == [2, 5, 0]
    assert head(scores, 3, largest=False).tolist() == [4, 0, 3]
    assert head(scores, 9, largest=True).tolist() == [2, 5, 0, 3, 4]


def test_overlap_is_the_share_of_the_heads_two_rankings_have_in_common() -> None:
    a, b = np.array([5.0, 4, 3, 2, 1, 0]), np.array([0.0, 5, 4, 3, 2, 1])
    assert overlap(a, b, 3, largest=True) == pytest.approx(2 / 3)
    assert overlap(a, b, 2, largest=False) == pytest.approx(1 / 2)
    assert overlap(a, a, 4, largest=True) == 1


def test_random_rankings_share_k_of_n() -> None:
    draws = np.random.default_rng(0).random((2, 20_000))
    assert overlap(draws[0], draws[1], 2000, largest=True) == pytest.approx(0.1, abs=0.02)


def test_rank_correlation_is_pearsons_of_the_ranks() -> None:
    a, b = np.random.default_rng(0).random((2, 50)) ** 3
    a[7] = NAN
    there = np.arange(50) != 7
    expected = np.corrcoef(rankdata(a[there]), rankdata(b[there]))[0, 1]
    assert rank_correlation(a, b) == pytest.approx(expected)
    assert np.isnan(rank_correlation(a, np.zeros(50)))


def test_two_samples_are_enough_for_a_rank_correlation_and_one_is_not() -> None:
    a, b = np.array([1.0, 5.0, NAN]), np.array([8.0, 2.0, 3.0])
    assert rank_correlation(a, b) == pytest.approx(-1)
    assert np.isnan(rank_correlation(a[1:], b[1:]))
    assert np.isnan(rank_correlation(np.zeros(3), b))


def test_samples_that_one_ranking_leaves_out_are_not_in_common() -> None:
    a, b = np.array([5.0, 4, NAN, 2, 1]), np.array([NAN, 4.0, 3, 2, 1])
    assert overlap(a, b, 3, largest=True) == pytest.approx(2 / 3)
