"""The figures of a run: what is drawn, what to see in it, and its data; from the store and the task's pictures alone."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from influence_jobs.errors import DataError
from influence_jobs.report import published
from influence_jobs.report.captions import MAX_ROWS, ablation_seen, ranking_of, scores_seen
from influence_jobs.report.contact_sheet import Row, contact_sheet
from influence_jobs.report.curves import (
    Panel,
    ablation_panels,
    chart,
    epoch_panels,
    histogram_panels,
    lds_panels,
)
from influence_jobs.report.ranking import (
    NothingLeft,
    RankedRow,
    by_query,
    named,
    norm_arrays,
    places,
    ranked_norms,
    ranked_scores,
    sides,
    summed_over,
)
from influence_jobs.report.sheets import layer_rows, node_rows, score_rows, seed_rows
from influence_jobs.specs import (
    AblationSpec,
    AttributionSpec,
    GradNormsSpec,
    InfluenceSpec,
    LdsSpec,
    PaperSpec,
    Ranking,
    ScoresSpec,
    Spec,
    StabilitySpec,
    TrainSpec,
)
from influence_jobs.store.rankings import score_blocks
from influence_jobs.store.run import Run
from influence_jobs.store.top import row_totals, top_of
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.layers import weight_layers
from influence_jobs.tasks.registry import make_task

PER_ROW = 5  # samples in a row of pictures
MAX_NODES = 20  # of a layer that counts as one of classes
SEED_QUERIES = 3  # queries that are shown after each training
BINS = 80


@dataclass(frozen=True)
class Shown:
    """One figure: rows of pictures, or the panels of a chart.

    Attributes:
        name: Of its files, unique in its run.
        title: What it is.
        caption: What to see.
        data: What is drawn, and more of the same kind where not all is.
        number: Of the report's figure that it corresponds to.
    """

    name: str
    title: str
    caption: str
    data: pa.Table
    rows: Sequence[Row] = ()
    panels: Sequence[Panel] = ()
    number: str | None = None

    @property
    def heading(self) -> str:
        """Number and title."""
        return f"Figure {self.number}. {self.title}" if self.number else self.title

    def draw(self) -> Figure:
        """The whole figure, for print."""
        return contact_sheet(self.rows) if self.rows else chart(self.panels)


def figures_of(run: Run, say: Callable[[str], None], *, numbered: bool = False) -> list[Shown]:
    """The figures of a finished run; none of a paper run itself, whose parts have them.

    Args:
        run: Any run.
        say: Told in a line what cannot be shown, and why.
        numbered: The run is part of a paper run: its figures bear the report's numbers.
    """
    found = list(_Figures(run, say).all())
    if not numbered:
        return found
    return [replace(shown, number=_number(run.spec, shown)) for shown in found]


def parts_of(run: Run) -> list[Run]:
    """The parts of a paper run, else the run itself."""
    if isinstance(run.spec, PaperSpec):
        return [Run(run.root, part) for part in run.spec.parts]
    return [run]


class _Figures:
    """Makes the figures of one run."""

    def __init__(self, run: Run, say: Callable[[str], None]):
        self.run, self.say = run, say

    @cached_property
    def task(self) -> Task:
        return make_task(self.run.spec.task)

    def all(self) -> Iterator[Shown]:
        spec = self.run.spec
        if isinstance(spec, TrainSpec):
            yield self._epochs()
        if isinstance(spec, (TrainSpec, GradNormsSpec)):
            yield from self._norms()
        elif isinstance(spec, ScoresSpec):
            yield from self._scores()
        elif isinstance(spec, StabilitySpec):
            yield from self._stability(spec)
        elif isinstance(spec, AblationSpec):
            yield from self._ablation(spec)
        elif isinstance(spec, LdsSpec):
            summary = self.run.read_table("summary")
            yield Shown(
                "lds",
                "Linear datamodeling scores",
                f"A method is as good as its bar is long: 1 would predict every retrained model's {spec.queries.quantity}. Lines: "
                "95 % intervals over subsets.",
                summary,
                panels=lds_panels(summary.to_pylist()),
            )

    @property
    def _has_classes(self) -> bool:
        return self.task.output_loss == "cross-entropy"

    def _pictures(
        self,
        make: Callable[[Task, Sequence[RankedRow]], Sequence[Row]],
        ranked: Sequence[RankedRow],
    ) -> Sequence[Row]:
        """Rows of pictures of ranked samples, or none where the task's data are not here."""
        try:
            return make(self.task, ranked)
        except DataError as error:
            self.say(f"{self.run.id}: no pictures: {error}")
            return ()

    # -- training and norms -----------------------------------------------------------------------

    def _epochs(self) -> Shown:
        metrics = self.run.read_table("metrics")
        last = metrics.to_pylist()[-1]
        said = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in last.items() if k != "epoch")
        return Shown(
            "training",
            "What the training measured after each epoch",
            f"After epoch {last['epoch']}: {said}.",
            metrics,
            panels=epoch_panels(metrics.to_pylist()),
        )

    def _norms(self) -> Iterator[Shown]:
        arrays = norm_arrays(self.run)
        for layer, array in arrays.items():
            yield self._histogram(layer, array)
        if isinstance(self.run.spec, GradNormsSpec):
            yield from self._largest(arrays)
        if arrays:
            yield from self._nodes(arrays)

    def _histogram(self, layer: str, array: str) -> Shown:
        totals_N = row_totals(self.run, array)
        spec = self.run.spec
        theirs = isinstance(spec, TrainSpec) and spec.task.name in published.SETTLED_LAYER
        limit = published.NORM_LIMIT if theirs else float(np.percentile(totals_N, 99))
        counts, edges = np.histogram(totals_N, bins=BINS)
        summed = summed_over(self.run, array)
        beyond = int((totals_N > limit).sum())
        return Shown(
            f"norms-{_file_name(layer)}",
            f"Gradient norms at layer {layer}",
            f"{beyond:,} of {len(totals_N):,} samples lie beyond {limit:.3g}, the broken line"
            f"{', where the report drew it' if theirs else ' (the last hundredth)'}; the largest is "
            f"{totals_N.max():.3g}, the median {np.median(totals_N):.3g}.",
            pa.table({"from": edges[:-1], "to": edges[1:], "samples": counts}),
            panels=histogram_panels(
                counts,
                edges,
                limit,
                f"gradient norm at {layer}{f', summed over {summed}' if summed else ''}",
            ),
        )

    def _largest(self, arrays: Mapping[str, str]) -> Iterator[Shown]:
        ranked = ranked_norms(self.run, PER_ROW)
        rows = [{"layer": layer, **row} for layer, array in arrays.items() for row in ranked[array]]
        if pictures := self._pictures(layer_rows, rows[: PER_ROW * MAX_ROWS]):
            yield Shown(
                "largest-norms",
                f"The {PER_ROW} samples with the largest norms",
                "Their gradients are the largest; plain attribution tends to rank them high, whatever is asked.",
                pa.Table.from_pylist(rows),
                rows=pictures,
            )

    def _nodes(self, arrays: Mapping[str, str]) -> Iterator[Shown]:
        """The top samples of every node of the last layer, if its norms are there and its nodes are few: classes."""
        try:
            layer = weight_layers(self.task, self.task.model())[-1]
        except DataError:  # told where pictures were wanted
            return
        if layer not in arrays:
            return
        array = arrays[layer]
        shape = self.run.array(array).shape[self.run.row_axis(array) + 1 :]
        if not (shape and shape[0] <= MAX_NODES and self._has_classes):
            return
        if "label" not in self.task.describe(np.array([0])):
            return
        ranked = [
            {"channel": channel, **row}
            for channel in range(shape[0])
            for row in ranked_norms(self.run, PER_ROW, layer=layer, channel=channel)[array]
        ]
        matching = sum(row["label"] == row["channel"] for row in ranked)
        if pictures := self._pictures(node_rows, ranked):
            yield Shown(
                "nodes",
                f"Top {PER_ROW} samples of each output node, by gradient norm",
                f"{matching} of {len(ranked)} have the node's own label (green frame).",
                pa.Table.from_pylist(ranked),
                rows=pictures,
            )

    # -- scores -----------------------------------------------------------------------------------

    def _scores(self) -> Iterator[Shown]:
        try:
            ranked = ranked_scores(self.run, PER_ROW)
        except NothingLeft as error:
            self.say(f"{self.run.id}: nothing to show: {error}")
            return
        queries = self.run.read_table("queries").to_pylist()
        for side in sides(self.run):
            of_side = [row for row in ranked if row["side"] == side]
            if pictures := self._pictures(score_rows, _of_first(of_side, MAX_ROWS)):
                yield Shown(
                    f"top-{_file_name(side)}",
                    f"Top {PER_ROW} by {ranking_of(self.run, side)}",
                    scores_seen(of_side, queries, classes=self._has_classes),
                    pa.Table.from_pylist(of_side),
                    rows=pictures,
                )

    # -- experiments ------------------------------------------------------------------------------

    def _stability(self, spec: StabilitySpec) -> Iterator[Shown]:
        for rankings in spec.methods:
            ranked = self._after_each_training(rankings)
            pictures = self._pictures(seed_rows, _of_first(ranked, SEED_QUERIES))
            if not pictures:
                continue
            count = len(spec.queries.items)
            method = named(rankings[0].name, spec.queries.quantity)
            times: dict[tuple[object, ...], int] = {}
            for row in ranked:
                key = row["test"], row.get("region"), row["sample"]
                times[key] = times.get(key, 0) + 1
            once = sum(count == 1 for count in times.values())
            yield Shown(
                f"seeds-{_file_name(rankings[0].name)}",
                f"Top {PER_ROW} by {method} after each of {len(rankings)} trainings",
                f"The first {min(SEED_QUERIES, count)} of {count} queries. Of the {len(times)} samples "
                f"found in all, {once} come first after one training only.",
                pa.Table.from_pylist(ranked),
                rows=pictures,
            )

    def _after_each_training(self, rankings: Sequence[Ranking]) -> list[dict[str, Any]]:
        root, samples = (
            self.run.root,
            Run(self.run.root, rankings[0].scores[0]).read_table("samples"),
        )
        queries = places(self.run.read_table("queries").to_pylist())
        tops = [
            top_of(
                score_blocks(root, ranking), range(len(queries)), PER_ROW, largest=ranking.largest
            )
            for ranking in rankings
        ]
        return [
            {
                **place,
                "side": rankings[0].name,
                "training": "first training" if i == 0 else f"retraining {i}",
                "rank": rank,
                "score": float(score),
                **sample,
            }
            for query, place in enumerate(queries)
            for i, found in enumerate(tops)
            for rank, (sample, score) in enumerate(
                zip(samples.take(found[query][0]).to_pylist(), found[query][1], strict=True),
                start=1,
            )
        ]

    def _ablation(self, spec: AblationSpec) -> Iterator[Shown]:
        rows, quantity = self.run.read_table("summary").to_pylist(), spec.queries.quantity
        for by in dict.fromkeys(row["by"] for row in rows):
            if by == "random":
                continue
            mine = [row for row in rows if row["by"] in (by, "random")]
            yield Shown(
                f"ablation-{_file_name(by)}",
                f"Change of the queries' {quantity} when their top k by {named(by, quantity)} are manipulated",
                ablation_seen(mine, by),
                pa.Table.from_pylist(mine),
                panels=ablation_panels(rows, by, quantity),
            )


def _of_first(ranked: Sequence[RankedRow], count: int) -> list[RankedRow]:
    """The rows of the first queries."""
    return [row for rows in list(by_query(ranked).values())[:count] for row in rows]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w+-]+", "-", text).strip("-")


def _number(spec: object, shown: Shown) -> str | None:
    """The report's number of a figure of one of its experiments."""
    if not isinstance(spec, Spec) or spec.task.name not in published.SETTLED_LAYER:
        return published.FIGURES.get(shown.name)
    layer = published.SETTLED_LAYER[spec.task.name]
    if isinstance(spec, AttributionSpec):
        if spec.exclude_norm_above is not None:
            return "4.14"
        if not spec.normalize:
            return "4.11"
        return "4.15" if spec.layers == (layer,) else "4.16"
    if isinstance(spec, InfluenceSpec):
        return "4.12"
    return "4.13" if shown.name == f"norms-{_file_name(layer)}" else None
