"""Ablation: the new labels of samples, and a summary of the retrainings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from influence_jobs.experiments.intervals import mean_interval


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


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The effect of manipulations on the loss, averaged over queries.

    Args:
        rows: One row per retraining and query: `mode`, `by`, `k`, `query`, `loss`, `decision` (None
            if the task has none), and `loss_before` and `decision_before` of the model trained on
            the unchanged data with the same seed.

    Returns:
        One row for each (mode, by, k): the mean change of the loss with its 95 % bootstrap interval
        over queries (seeds are averaged first), the mean loss, and how many retrainings changed
        the decision.
    """
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["by"], row["k"]), []).append(row)
    found = []
    for (mode, by, k), group in groups.items():
        by_query: dict[int, list[float]] = {}
        for row in group:
            by_query.setdefault(row["query"], []).append(row["loss"] - row["loss_before"])
        change = mean_interval(np.array([np.mean(changes) for changes in by_query.values()]))
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
            }
        )
    return found
