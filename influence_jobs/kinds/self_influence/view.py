"""The view of self-influence: its distribution, and the samples with the largest."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import pyarrow as pa

from influence_jobs.errors import SpecError
from influence_jobs.kinds.self_influence.spec import SelfInfluenceSpec
from influence_jobs.store.layout import (
    LABELS,
    LOSSES_OF_ROWS,
    PREDICTED,
    PROBABILITY,
    SELF_INFLUENCE,
)
from influence_jobs.store.top import largest_rows
from influence_jobs.views.base import Say, View

if TYPE_CHECKING:
    from influence_jobs.views.figure import Shown

#: What suspects are ranked by.
By = Literal["self-influence", "loss"]

ARRAYS: Mapping[str, str] = {"self-influence": SELF_INFLUENCE, "loss": LOSSES_OF_ROWS}
# Columns of ranked rows, with the array of each.
COLUMNS = {
    "label": LABELS,
    "predicted": PREDICTED,
    "probability": PROBABILITY,
    "loss": LOSSES_OF_ROWS,
    "self_influence": SELF_INFLUENCE,
}
SHOWN, PER_ROW, BINS = 20, 5, 80


class SelfInfluenceView(View[SelfInfluenceSpec]):
    """The samples that do most to their own loss; of classes, with what the model says instead."""

    ranks: ClassVar[str] = SELF_INFLUENCE

    @property
    def title(self) -> str:
        how = "" if self.spec.solver.uses_curvature else ", no curvature"
        return f"Self-influence ({self.spec.task.slug}{how})"

    @property
    def classifies(self) -> bool:
        """Whether the run has the label and the prediction of every sample."""
        return PREDICTED in self.run.array_names()

    def certainty(self) -> list[str]:
        lines = ["Of one training: another seed gives other values."]
        if not self.spec.solver.uses_curvature:
            return [*lines, "No curvature: the squared norm of each sample's gradient."]
        (damping,) = self.run.read_table("curvature").column("damping").to_pylist()
        of = self.spec.curvature.samples
        subset = "all samples" if of is None else f"at most {of:,} samples"
        lines.append(f"EK-FAC of {subset}, lambda = {damping:.4g}.")
        return lines

    def next_step(self) -> str:
        return f"infl {'suspects' if self.classifies else 'top'} {self.run.id}{self.more}"

    def top(
        self,
        k: int,
        *,
        layer: str | None = None,
        tests: Sequence[int] | None = None,
        side: str = "both",
        channel: int | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        if layer is not None or tests is not None or side != "both" or channel is not None:
            raise SpecError(
                f"{self.run.id} has one number for each sample, and no layers, queries or "
                "channels: leave --layer, --test, --side and --channel out"
            )
        if k < 1:
            raise SpecError(f"k = {k}: k must be at least 1")
        return {SELF_INFLUENCE: self._ranked(k, "self-influence")}

    def suspects(self, k: int, *, by: By = "loss") -> list[dict[str, Any]]:
        """The k samples whose labels are most likely wrong, the likeliest first.

        Returns:
            Rows with rank, sample, label, predicted (the class that the model finds most likely),
            probability (of that class), loss, the task's description, and self_influence.

        Raises:
            SpecError: The samples have not one class each, or an argument does not fit.
        """
        if not self.classifies:
            raise SpecError(
                f"{self.run.id} has no labels that could be wrong, since its samples do not have "
                "one class each (output_loss 'cross-entropy' and one target a sample): infl top "
                f"{self.run.id}{self.more} ranks them"
            )
        if by not in get_args(By):
            raise SpecError(f"by {by!r}: choose {', '.join(get_args(By))}")
        if k < 1:
            raise SpecError(f"k = {k}: k must be at least 1")
        ranked = self._ranked(k, by)
        return [{"rank": rank, **row} for rank, row in enumerate(ranked, start=1)]

    def _ranked(self, k: int, by: By) -> list[dict[str, Any]]:
        ids, _ = largest_rows(self.run, ARRAYS[by], k)
        names = self.run.array_names()
        there = {column: array for column, array in COLUMNS.items() if array in names}
        # Each chunk is read once, however many of its rows are wanted.
        values = {
            column: np.asarray(self.run.array(array).oindex[ids]).tolist()
            for column, array in there.items()
        }
        described = self.run.read_table("samples").take(ids).to_pylist()
        rows = []
        for i, own in enumerate(described):
            found = {column: of[i] for column, of in values.items()}
            # A task may describe the label in its own words.
            words = {
                f"task_{name}" if name in found else name: value
                for name, value in own.items()
                if name != "sample" and not (name == "label" and value == found.get("label"))
            }
            value = {SELF_INFLUENCE: found.pop(SELF_INFLUENCE)}  # last, as what they rank by
            rows.append({"sample": own["sample"], **found, **words, **value})
        return rows

    def numbers_of(self, sample: int) -> list[tuple[str, float]]:
        names = self.run.array_names()
        return [
            (column.replace("_", "-"), self.run.read_rows(array, sample, sample + 1)[0].item())
            for column, array in COLUMNS.items()
            if array in names
        ]

    def figures(self, say: Say) -> "Iterator[Shown]":
        yield self._histogram()
        yield from self._largest("self-influence", say)
        if self.classifies:
            yield from self._largest("loss", say)

    def _histogram(self) -> "Shown":
        from influence_jobs.views.curves import histogram_panels
        from influence_jobs.views.figure import Shown

        array = self.run.array(SELF_INFLUENCE)
        values_N = np.asarray(array[:], dtype=np.float64)
        limit = float(np.percentile(values_N, 95))
        counts, edges = np.histogram(values_N, bins=BINS)
        share = float(values_N[values_N > limit].sum() / max(values_N.sum(), 1e-300))
        return Shown(
            "self-influence",
            "Self-influence of the training samples",
            f"{array.attrs['quantity']}. The 5 % of the samples above {limit:.3g}, the dashed "
            f"line, have {share:.0%} of the sum; the median is {np.median(values_N):.3g}, the "
            f"largest {values_N.max():.3g}.",
            pa.table({"from": edges[:-1], "to": edges[1:], "samples": counts}),
            panels=histogram_panels(counts, edges, limit, "self-influence"),
        )

    def _largest(self, by: By, say: Say) -> "Iterator[Shown]":
        from influence_jobs.views.figure import Shown
        from influence_jobs.views.sheets import plain_rows

        ranked = self._ranked(SHOWN, by)
        if not (pictures := self.pictures(plain_rows, ranked, say)):
            return
        title = f"The {len(ranked)} samples with the largest {by}"
        seen = "Rare, hard, or mislabelled samples."
        if self.classifies:
            other = sum(row["predicted"] != row["label"] for row in ranked)
            seen += f" For {other} of them the model finds another class likelier than the label."
        yield Shown(f"largest-{by}", title, seen, pa.Table.from_pylist(ranked), rows=pictures)
