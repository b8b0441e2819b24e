"""The view of gradient norms, replayed or recorded during training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa

from influence_jobs.errors import DataError, SpecError
from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.specs.base import TaskSpec
from influence_jobs.specs.norms import NormsSpec
from influence_jobs.store.layout import norms_name
from influence_jobs.store.run import Run
from influence_jobs.store.top import row_totals
from influence_jobs.tasks.layers import layers_of_run, weight_layers
from influence_jobs.views.base import Say, View
from influence_jobs.views.ranking import ranked_norms, summed_over

if TYPE_CHECKING:
    from influence_jobs.views.figure import Shown

PER_ROW = 5  # samples in a row of pictures
MAX_ROWS = 30  # rows of pictures in a figure; its data have all rows
MAX_NODES = 20  # a last layer with more nodes has no figure of nodes
BINS = 80

S = TypeVar("S", bound=NormsSpec)


@dataclass(frozen=True)
class StoredNorms:
    """Stored norms, and how a query's activations are computed to multiply with them.

    Attributes:
        run: The run with the norms.
        checkpoint: The weights that activations are taken at.
        layers: The layers with a norm for each channel.
        chosen: The layers that are used by default; their scores are summed.
        task: The task of the test images, with their noise level.
        seed, noise_draws: Seed and number of draws of the test images' noise.
        normalize, exclude_norm_above: Default values; see `AttributionSpec`.
    """

    run: Run
    checkpoint: Checkpoint
    layers: tuple[str, ...]
    chosen: tuple[str, ...]
    task: TaskSpec
    seed: int = 0
    noise_draws: int = 1
    normalize: bool = False
    exclude_norm_above: float | None = None


class NormsView(View[S]):
    """Shows histograms of norms, and the samples with the largest norms."""

    ranks: ClassVar[str] = "norms"

    @property
    def arrays(self) -> dict[str, str]:
        """The arrays of norms by layer."""
        return {layer: norms_name(layer) for layer in self.spec.layers_with_norms}

    def top(
        self,
        k: int,
        *,
        layer: str | None = None,
        tests: Sequence[int] | None = None,
        side: str = "both",
        channel: int | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        if tests is not None or side != "both":
            raise SpecError(
                f"{self.run.id} has norms, which do not depend on a query: leave --test and --side "
                "out"
            )
        chosen = self.arrays
        if layer is not None and chosen:
            meant = layers_of_run(layer, [*chosen], self.task)
            if not meant:
                has = ", ".join(chosen)
                raise SpecError(f"{self.run.id} has no norms of layer {layer}; it has {has}")
            chosen = {name: chosen[name] for name in meant}
        return ranked_norms(self.run, chosen, k, channel=channel)

    def numbers_of(self, sample: int) -> list[tuple[str, float]]:
        return [
            (
                f"norm at {layer}",
                float(np.sum(self.run.read_rows(array, sample, sample + 1), dtype=np.float64)),
            )
            for layer, array in self.arrays.items()
            if array in self.run.array_names()
        ]

    def histograms(self) -> "Iterator[Shown]":
        """The distribution of every layer's norms."""
        for layer, array in self.arrays.items():
            yield self._histogram(layer, array)

    def outliers_above(self) -> float | None:
        """The published norm above which samples count as outliers, if there is one."""
        return None

    def _histogram(self, layer: str, array: str) -> "Shown":
        from influence_jobs.views.curves import histogram_panels
        from influence_jobs.views.figure import Shown, file_name

        totals_N = row_totals(self.run, array)
        published = self.outliers_above()
        limit = float(np.percentile(totals_N, 99)) if published is None else published
        counts, edges = np.histogram(totals_N, bins=BINS)
        summed = summed_over(self.run, array)
        beyond = int((totals_N > limit).sum())
        where = " (the top 1 %)" if published is None else ", the limit in the research report"
        return Shown(
            f"norms-{file_name(layer)}",
            f"Gradient norms at layer {layer}",
            f"{beyond:,} of {len(totals_N):,} samples lie above {limit:.3g}, the dashed line"
            f"{where}; the largest is {totals_N.max():.3g}, the median {np.median(totals_N):.3g}.",
            pa.table({"from": edges[:-1], "to": edges[1:], "samples": counts}),
            panels=histogram_panels(
                counts,
                edges,
                limit,
                f"gradient norm at {layer}{f', summed over {summed}' if summed else ''}",
            ),
        )

    def largest(self, say: Say) -> "Iterator[Shown]":
        """The samples with the largest norms of each layer."""
        from influence_jobs.views.figure import Shown
        from influence_jobs.views.sheets import layer_rows

        ranked = ranked_norms(self.run, self.arrays, PER_ROW)
        rows = [
            {"layer": layer, **row} for layer, array in self.arrays.items() for row in ranked[array]
        ]
        if pictures := self.pictures(layer_rows, rows[: PER_ROW * MAX_ROWS], say):
            yield Shown(
                "largest-norms",
                f"The {PER_ROW} samples with the largest norms",
                "Plain attribution tends to rank samples with large norms high for every query.",
                pa.Table.from_pylist(rows),
                rows=pictures,
            )

    def nodes(self, say: Say) -> "Iterator[Shown]":
        """The top samples of each node of the last layer, if the nodes are classes."""
        from influence_jobs.views.figure import Shown
        from influence_jobs.views.sheets import node_rows

        arrays: Mapping[str, str] = self.arrays
        if not arrays:
            return
        try:
            layer = weight_layers(self.task, self.task.model())[-1]
        except DataError:  # figures with pictures report it
            return
        if layer not in arrays:
            return
        array = arrays[layer]
        shape = self.run.array(array).shape[self.run.row_axis(array) + 1 :]
        if not (shape and shape[0] <= MAX_NODES and self.has_classes):
            return
        if "label" not in self.task.describe(np.array([0])):
            return
        ranked = [
            {"channel": channel, **row}
            for channel in range(shape[0])
            for row in ranked_norms(self.run, {layer: array}, PER_ROW, channel=channel)[array]
        ]
        matching = sum(row["label"] == row["channel"] for row in ranked)
        if pictures := self.pictures(node_rows, ranked, say):
            yield Shown(
                "nodes",
                f"Top {PER_ROW} samples of each output node, by gradient norm",
                f"{matching} of {len(ranked)} have the node's own label (green frame).",
                pa.Table.from_pylist(ranked),
                rows=pictures,
            )
