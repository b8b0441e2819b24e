"""The view of a linear datamodeling score."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from influence_jobs.experiments.lds import Ceiling
from influence_jobs.kinds.lds.spec import LdsSpec
from influence_jobs.views.base import Say, View
from influence_jobs.views.table import Table

if TYPE_CHECKING:
    from influence_jobs.views.figure import Shown


class LdsView(View[LdsSpec]):
    """How well each method predicts the losses of retrained models."""

    @property
    def title(self) -> str:
        return f"Linear datamodeling scores ({self.spec.task.slug})"

    def certainty(self) -> list[str]:
        if self.spec.same_run:
            said = (
                f"{self.spec.subsets} subsets, each the same run from seed {self.spec.seeds[0]}, "
                "with the other samples masked; it says nothing of trainings from other seeds."
            )
            return [said]
        lines = [f"{self.spec.subsets} subsets, {len(self.spec.seeds)} training(s) each."]
        if (limit := self._ceiling) is not None:
            lines.append(limit.words)
        elif len(self.spec.seeds) > 1:
            lines.append(
                "The trainings of a subset share their initial weights, as in all runs of earlier "
                "versions, so the run does not tell the ceiling: submit it again for other starts."
            )
        return lines

    @property
    def _ceiling(self) -> Ceiling | None:
        """The ceiling; None with one seed a subset, or in a run of an earlier version."""
        if "ceiling" not in self.run.table_names():
            return None
        return Ceiling(**self.run.read_table("ceiling").to_pylist()[0])

    def next_step(self) -> str:
        return f"infl report {self.run.id}{self.more}"

    def tables(self) -> list[Table]:
        spec = self.spec
        rows = sorted(self.run.read_table("summary").to_pylist(), key=_by_mean)
        seeds, quantity = len(spec.seeds), spec.queries.quantity
        trainings = f"{seeds} training{'s' * (seeds > 1)} each"
        if spec.same_run:
            trainings = "the same run with the others masked"
        columns = ["method", "mean_lds", "low", "high", "queries"]
        names = ["method", "mean LDS", "95 % from", "to", "queries"]
        note = ""
        if (limit := self._ceiling) is not None and limit.value > 0:
            rows = [row | {"share": row["mean_lds"] / limit.value} for row in rows]
            columns.append("share")
            names.append("of the ceiling")
            note = (
                " The ceiling is what the agreement of seeds allows: the root of the reliability "
                f"of the losses, {limit.value:.3g}."
            )
        return [
            Table(
                title=f"Linear datamodeling score: {spec.subsets} subsets of {spec.fraction:g} of "
                f"the samples, {trainings}",
                columns=names,
                rows=[tuple(row[column] for column in columns) for row in rows],
                note=f"Spearman's correlation over subsets of summed scores and each query's "
                f"{quantity}, mean over queries. Intervals: percentile bootstrap over subsets. "
                f"Positive: the samples that a method ranks first lower the {quantity}.{note}",
            )
        ]

    def figures(self, say: Say) -> "Iterator[Shown]":
        from influence_jobs.views.curves import lds_panels
        from influence_jobs.views.figure import Shown

        summary = self.run.read_table("summary")
        yield Shown(
            "lds",
            "Linear datamodeling scores",
            "Longer bars are better: a score of 1 predicts the order of all retrained models' "
            f"{self.spec.queries.quantity}. Lines: 95 % intervals over subsets.",
            summary,
            panels=lds_panels(summary.to_pylist()),
        )


def _by_mean(row: Mapping[str, Any]) -> tuple[bool, float]:
    return bool(np.isnan(row["mean_lds"])), -row["mean_lds"]
