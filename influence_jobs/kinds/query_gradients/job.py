"""Projected gradients of queries, one by one: each may be gigabytes."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from influence_jobs.gradients import ParameterSpace
from influence_jobs.gradients.projections import Projection, together
from influence_jobs.jobs.base import Progress, Result, Shard
from influence_jobs.jobs.queries import query_gradients, require_queries, write_queries
from influence_jobs.jobs.samples import SampleJob, dtype_for, trained_inputs
from influence_jobs.kinds.gradients.rows import (
    packed_rows,
    projections_of,
    row_layouts,
    sizes_of,
)
from influence_jobs.kinds.query_gradients.spec import QueryGradientsSpec
from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.layout import ArrayLayout
from influence_jobs.tasks.base import Draw


class QueryGradientsJob(SampleJob[QueryGradientsSpec]):
    """A shard is a range of queries."""

    spec_type = QueryGradientsSpec
    reads_samples = False
    passes = 1

    @property
    def title(self) -> str:
        return f"query-gradients {self.spec.task.slug} {self.num_rows} queries"

    @staticmethod
    def inputs(spec: QueryGradientsSpec) -> tuple[AnySpec, ...]:
        return trained_inputs((spec.gradients.checkpoint,))

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.spec.gradients.checkpoint,)

    @property
    def num_rows(self) -> int:
        return len(self.spec.queries.items)

    def layouts(self) -> tuple[ArrayLayout, ...]:
        return row_layouts(
            self.num_rows,
            sizes_of(self._projections),
            stored="float32",
            axis="query",
            quantity=self.spec.queries.quantity,
        )

    def run(self, shard: Shard, progress: Progress) -> Result:
        progress(0)
        self.load(self.spec.gradients.checkpoint)
        require_queries(self.task, self.spec.queries)
        rows: dict[str, list[npt.NDArray[Any]]] = {group: [] for group in self._projections}
        values = []
        for i in range(shard.start, shard.stop):
            for group, projected in self._projected(i).items():
                rows[group].append(projected)
            values.append(self._measured(i))
            progress(i + 1 - shard.start)
        found = {group: np.concatenate(parts) for group, parts in rows.items()}
        return Result(packed_rows(found, np.array(values), stored="float32"))

    def _projected(self, i: int) -> dict[str, npt.NDArray[Any]]:
        """The projections (1, D) of one query's gradient, by group."""
        queries = self.spec.queries
        gradient_P = query_gradients(self.task, self.model, self._space, queries, i, i + 1)
        parts = self._space.split(gradient_P)
        found = {}
        for group, of_group in self._projections.items():
            projected = {
                name: one.to(gradient_P.device, torch.float64)(parts[name].double())
                for name, one in of_group.items()
            }
            found[group] = together(of_group, projected).cpu().numpy()
        return found

    def _measured(self, i: int) -> float:
        """The quantity of a query, mean over noise draws."""
        queries = self.spec.queries
        query, total = queries.items[i], 0.0
        for draw in range(queries.noise_draws):
            batch = self.task.test_batch(torch.tensor([query.test]), Draw(queries.seed, draw))
            batch = self.placed(batch)
            with torch.no_grad():
                measured = self.task.measure(self.model, batch, queries.quantity, query.region)
            total += float(measured.sum()) / queries.noise_draws
        return total

    def load(self, checkpoint: Checkpoint) -> None:
        super().load(checkpoint)
        if dtype_for(self.spec.gradients.precision) == torch.bfloat16:
            # The samples' gradients are of rounded weights; a query's own are kept exact.
            for parameter in self.model.parameters():
                parameter.data.copy_(parameter.data.bfloat16())

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.spec.gradients.precision == "float64" else torch.float32

    @cached_property
    def _space(self) -> ParameterSpace:
        return ParameterSpace(self.model, self.spec.gradients.modules)

    @cached_property
    def _projections(self) -> dict[str, dict[str, Projection]]:
        return projections_of(self.spec.gradients, self.model, self._space)

    def probe(self) -> Iterator[float]:
        while True:
            self._projected(0)
            yield 1

    def finish(self) -> Result:
        return Result(files=write_queries(self.run_store, self.task, self.spec.queries))
