"""Ablation: the new labels of samples, and a summary of the retrainings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from influence_jobs.experiments.intervals import Interval, mean_interval


def new_labels(
    rule: str,
    ids: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    query_label: int,
    *,
    num_classes: int,
    seed: int,
) -> npt.NDArray[np.int64]:
    """The labels that samples get instead of their own, shape (k,).

    Args:
        rule: `report`, as in the research report: 0 for all, or 1 if the query's label is 0 (a
            sample may already have this label); `next`: a sample's own label plus one; `random`: a
            class other than its own, drawn by (seed, id).
        ids: Ids of the samples, (k,).
        labels: Their own labels, (k,).
        query_label: Label of the query.
        num_classes: Number of classes.
        seed: Seed of `random`.
    """
    if rule == "report":
        return np.full_like(labels, 1 if query_label == 0 else 0)
    if rule == "next":
        return (labels + 1) % num_classes
    # The third word of the counter keeps this stream apart from all others.
    draws = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 3, 0]))
    shift_N = draws.integers(1, num_classes, size=int(ids.max()) + 1)  # the shift of id i is at i
    return (labels + shift_N[ids]) % num_classes


def psnr_falls(
    errors: npt.NDArray[np.floating], before: npt.NDArray[np.floating]
) -> npt.NDArray[np.float64]:
    """The fall of the PSNR, in dB, when squared errors were `before`; the peak cancels out."""
    falls: npt.NDArray[np.float64] = 10 * np.log10(errors.astype(np.float64) / before)
    return falls


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The effect of manipulations on the loss, averaged over queries.

    Args:
        rows: One row per retraining and query: `mode`, `by`, `k`, `query`, `loss`, `decision` (None
            if the task has none), and `loss_before` and `decision_before` of the model trained on
            the unchanged data with the same seed. `loss_elsewhere` and `loss_elsewhere_before` are
            the mean loss of the other queries of the same test sample, if there are any;
            `psnr_fall` and `psnr_fall_elsewhere` are there if losses are squared errors.

    Returns:
        One row for each (mode, by, k): the mean change of the loss with its 95 % bootstrap interval
        over queries (seeds are averaged first), the mean loss, and how many retrainings changed
        the decision. If there are such queries and errors, also the mean change elsewhere, the
        mean falls of the PSNR, and how much larger they are at the query than elsewhere.
    """
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["by"], row["k"]), []).append(row)
    found = []
    for (mode, by, k), group in groups.items():
        change = _over_queries(group, lambda row: _minus(row["loss"], row["loss_before"]))
        assert change is not None
        decided = [row for row in group if row["decision"] is not None]
        found.append(
            {
                "mode": mode,
                "by": by,
                "k": k,
                "mean_change": change.mean,
                "low": change.low,
                "high": change.high,
                "mean_loss": float(np.mean([row["loss"] for row in group])),
                "mean_loss_before": float(np.mean([row["loss_before"] for row in group])),
                "changed_decisions": sum(r["decision"] != r["decision_before"] for r in decided),
                "decisions": len(decided),
                **_elsewhere(group),
            }
        )
    return found


def _elsewhere(group: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What one (mode, by, k) does to squared errors as PSNR, and to other queries."""
    measured = {
        "change_elsewhere": lambda row: _minus(
            row.get("loss_elsewhere"), row.get("loss_elsewhere_before")
        ),
        "psnr_fall": lambda row: row.get("psnr_fall"),
        "psnr_fall_elsewhere": lambda row: row.get("psnr_fall_elsewhere"),
        "psnr_fall_beyond": lambda row: _minus(
            row.get("psnr_fall"), row.get("psnr_fall_elsewhere")
        ),
    }
    found: dict[str, float] = {}
    for name, measure in measured.items():
        if mean := _over_queries(group, measure):
            found |= {f"mean_{name}": mean.mean, f"{name}_low": mean.low, f"{name}_high": mean.high}
    return found


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _over_queries(
    group: Sequence[Mapping[str, Any]], measure: Callable[[Mapping[str, Any]], float | None]
) -> Interval | None:
    """The mean over queries, seeds averaged first; None if no query has the value."""
    by_query: dict[int, list[float]] = {}
    for row in group:
        if (value := measure(row)) is not None:
            by_query.setdefault(row["query"], []).append(value)
    if not by_query:
        return None
    return mean_interval(np.array([np.mean(values) for values in by_query.values()]))
