"""New labels and the summary of an ablation, compared with results worked out by hand."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from influence_jobs.datasets.quality import psnr
from influence_jobs.experiments.ablation import new_labels, psnr_falls, summary
from influence_jobs.experiments.intervals import mean_interval

IDS = np.array([7, 2, 11])
LABELS = np.array([0, 9, 4])


def labels(rule: str, query_label: int = 3, seed: int = 0, ids=IDS, own=LABELS) -> list[int]:
    return new_labels(rule, ids, own, query_label, num_classes=10, seed=seed).tolist()


def test_the_research_reports_rule_is_class_0_or_1_for_queries_of_class_0() -> None:
    assert labels("report", query_label=3) == [0, 0, 0]
    assert labels("report", query_label=0) == [1, 1, 1]


def test_the_next_class_follows_the_last_with_the_first() -> None:
    assert labels("next") == [1, 0, 5]


def test_random_labels_are_other_classes_and_depend_on_seed_and_id_alone() -> None:
    ids, own = np.arange(5000), np.arange(5000) % 10
    found = np.array(labels("random", ids=ids, own=own))
    assert (found != own).all()
    assert np.bincount((found - own) % 10, minlength=10)[1:].min() > 450
    assert labels("random", ids=ids, own=own, seed=1) != found.tolist()
    few = np.array([4000, 3, 17])
    assert labels("random", ids=few, own=own[few]) == found[few].tolist()


def row(query: int, loss: float, before: float, decision: int | None = 1, **more) -> dict:
    return {
        "mode": "remove", "by": "helpful", "k": 5, "query": query,
        "loss": loss, "loss_before": before,
        "decision": decision, "decision_before": None if decision is None else 1, **more,
    }  # fmt: skip


def test_seeds_are_averaged_before_queries_are_resampled() -> None:
    rows = [row(0, 3, 1), row(0, 5, 1, decision=2), row(1, 1, 2), row(1, 1, 0), row(0, 9, 1, k=6)]
    first, second = summary(rows)
    assert (first["mode"], first["by"], first["k"]) == ("remove", "helpful", 5)
    assert first["mean_change"] == pytest.approx((3 + 0) / 2)
    assert 0 <= first["low"] < 1.5 < first["high"] <= 3
    assert first["mean_loss"] == pytest.approx(2.5)
    assert first["mean_loss_before"] == pytest.approx(1)
    assert (first["changed_decisions"], first["decisions"]) == (1, 4)
    assert second["k"] == 6
    assert np.isnan(second["low"])


def test_a_task_without_decisions_has_none_changed() -> None:
    (only,) = summary([row(0, 2, 1, decision=None)])
    assert (only["changed_decisions"], only["decisions"]) == (0, 0)


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1).exponential(size=(200, 40))
    covered = [mean_interval(values).low < 1 < mean_interval(values).high for values in draws]
    assert 0.89 < np.mean(covered) < 0.99
    assert mean_interval(np.full(5, 3.0)) == (3, 3, 3)


def test_random_labels_are_the_ones_that_stored_runs_were_trained_on() -> None:
    assert labels("random") == [4, 8, 7]


def test_the_interval_of_a_mean_is_the_bca_bootstraps() -> None:
    values = np.random.default_rng(2).exponential(size=30)
    found = mean_interval(values)
    draws = np.random.default_rng(5)
    means = np.sort(draws.choice(values, (20_000, 30)).mean(axis=1))
    below = norm.ppf((means < values.mean()).mean())
    without = (values.sum() - values) / 29
    skew = ((without.mean() - without) ** 3).sum() / (
        6 * ((without - without.mean()) ** 2).sum() ** 1.5
    )
    shares = [
        norm.cdf(below + (below + z) / (1 - skew * (below + z))) for z in norm.ppf([0.025, 0.975])
    ]
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(means, shares), abs=0.02)
    assert np.isnan(mean_interval(values[:1]).low)
    assert not np.isnan(mean_interval(values[:2]).low)


def test_the_fall_of_the_psnr_is_that_of_the_images() -> None:
    clean, before, after = torch.rand(3, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = [(other - clean).square().mean(dim=(1, 2, 3)).numpy() for other in (after, before)]
    expected = psnr(clean, before) - psnr(clean, after)
    np.testing.assert_allclose(psnr_falls(*errors), expected.numpy(), rtol=1e-4)


def test_what_happens_elsewhere_is_subtracted_query_by_query() -> None:
    rows = [
        row(0, 2, 1, psnr_fall=3.0, psnr_fall_elsewhere=1.0, loss_elsewhere=5.0,
            loss_elsewhere_before=4.0),
        row(0, 2, 1, psnr_fall=5.0, psnr_fall_elsewhere=1.0, loss_elsewhere=5.0,
            loss_elsewhere_before=2.0),
        row(1, 2, 1, psnr_fall=1.0, psnr_fall_elsewhere=0.0, loss_elsewhere=1.0,
            loss_elsewhere_before=1.0),
        row(2, 2, 1, psnr_fall=7.0, psnr_fall_elsewhere=None, loss_elsewhere=None,
            loss_elsewhere_before=None),
    ]  # fmt: skip
    (only,) = summary(rows)
    assert only["mean_psnr_fall"] == pytest.approx((4 + 1 + 7) / 3)
    assert only["mean_psnr_fall_elsewhere"] == pytest.approx((1 + 0) / 2)
    assert only["mean_psnr_fall_beyond"] == pytest.approx((3 + 1) / 2)
    assert only["psnr_fall_beyond_low"] <= 2 <= only["psnr_fall_beyond_high"]
    assert only["mean_change_elsewhere"] == pytest.approx((2 + 0) / 2)
    assert "mean_psnr_fall" not in summary([row(0, 2, 1)])[0]
