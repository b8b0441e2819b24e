"""Ablation: which labels a manipulation gives, and what came of it."""

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
        rule: `report`: all 0, or 1 where the query's own label is 0 (some samples may have that label already); `next`:
            each sample's own plus one; `random`: another class than its own, by (seed, id).
        ids: Of the samples, (k,).
        labels: Their own labels, (k,).
        query_label: Label of the query.
    """
    if rule == "report":
        return np.full_like(labels, 1 if query_label == 0 else 0)
    if rule == "next":
        return (labels + 1) % num_classes
    # The third counter word keeps it off the streams of other draws.
    draws = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 3, 0]))
    shift_N = draws.integers(1, num_classes, size=int(ids.max()) + 1)  # a stream read up to the id
    return (labels + shift_N[ids]) % num_classes


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a manipulation did to the loss, on average over queries.

    Args:
        rows: One a retraining and query: `mode`, `by`, `k`, `query`, `loss`, `decision` (None if the task has none),
            `loss_before` and `decision_before` of the model that nothing was done to, of the same seed.

    Returns:
        One row for each (mode, by, k): the mean change of the loss with its 95 % bootstrap interval over queries (of
        several seeds the mean counts), the mean loss, and how many of the retrainings changed the decision.
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
