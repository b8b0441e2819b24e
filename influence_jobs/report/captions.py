"""Captions: a run's scores in words, and what to see in a figure."""

from collections.abc import Mapping, Sequence
from typing import Any

from influence_jobs.report.ranking import RankedRow, by_query, sides
from influence_jobs.specs import AttributionSpec, BaselineSpec, InfluenceSpec, ScoresSpec
from influence_jobs.store.run import Run

MAX_ROWS = 30  # rows of pictures in a figure; its data have all


def method_of(spec: ScoresSpec) -> str:
    """What scores, in words."""
    if isinstance(spec, InfluenceSpec):
        solvers = ", ".join(dict.fromkeys(s_test.solver.name for s_test in spec.s_tests))
        over = f", {spec.combine} of {len(spec.s_tests)}" if len(spec.s_tests) > 1 else ""
        divided = f", {spec.relative}-relative" if spec.relative else ""
        return f"influence ({solvers}{over}{divided})"
    if isinstance(spec, AttributionSpec):
        words = f"attribution at {', '.join(spec.layers)}"
        if spec.normalize:
            words += ", norms divided by their sum"
        if spec.exclude_norm_above is not None:
            words += f", without samples of a norm above {spec.exclude_norm_above:g}"
        return words
    assert isinstance(spec, BaselineSpec)
    return spec.method


def ranking_of(run: Run, side: str) -> str:
    """One end of a run's ranking, in words."""
    assert isinstance(run.spec, ScoresSpec)
    return f"{method_of(run.spec)}{f': {side}' if len(sides(run)) > 1 else ''}"


def scores_seen(
    ranked: Sequence[RankedRow], queries: Sequence[Mapping[str, Any]], *, classes: bool
) -> str:
    """What to see in the top samples of some queries.

    Args:
        ranked: Rows of `ranked_scores`, of one side.
        queries: Rows of the run's table of queries.
        classes: Labels are classes, so that one is the same as another or not.
    """
    different = len({row["sample"] for row in ranked})
    said = f"{different} different samples in {len(ranked)} places."
    if classes and "label" in ranked[0] and "label" in queries[0]:
        labels = {(query["test"], query["region"]): query["label"] for query in queries}
        matching = sum(row["label"] == labels[row["test"], row.get("region")] for row in ranked)
        said += f" {matching} have the label of their query (green frame)."
    if any(row.get("region") for row in ranked):
        said += " The mark is at what is explained."
    if (count := len(by_query(ranked))) > MAX_ROWS:
        said += f" The first {MAX_ROWS} of {count} queries; the data have all."
    return said


def ablation_seen(rows: Sequence[Mapping[str, Any]], by: str) -> str:
    """What to see in the curves of an ablation, of one method and of random samples."""
    said = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        largest = max(row["k"] for row in rows if row["mode"] == mode)
        found = {row["by"]: row for row in rows if row["mode"] == mode and row["k"] == largest}
        verb = {"relabel": "relabelled", "remove": "removed"}[mode]
        text = f"With {largest:,} samples {verb} the mean changes by {found[by]['mean_change']:.3g}"
        if "random" in found and by != "random":
            text += f", with random ones by {found['random']['mean_change']:.3g}"
        said.append(f"{text}.")
    return (
        " ".join(said)
        + " Bands: 95 % intervals over queries. Numbers at points: changed decisions."
    )
