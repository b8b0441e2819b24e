"""Projected gradients of training samples, or of queries, at one checkpoint."""

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from influence_jobs.gradients import GradProjections, ParameterSpace
from influence_jobs.gradients.fallback import slow_lines
from influence_jobs.gradients.projections import Projection, projected_size, projections
from influence_jobs.jobs.base import Progress, Result, Shard
from influence_jobs.jobs.queries import query_gradients, require_queries, write_queries
from influence_jobs.jobs.samples import SampleJob, trained_inputs
from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.methods.packing import CODES, code_shape, packed, row_bytes
from influence_jobs.methods.rounding import rounding_lines
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.layout import (
    LOSSES_OF_ROWS,
    ArrayLayout,
    chunk_rows,
    gradients_name,
    scales_name,
)
from influence_jobs.tasks.base import Batch, Draw, to_device, to_type

log = logging.getLogger(__name__)

PROBED_ROWS = 1024  # from which the loss by rounding is measured

Rows = dict[str, npt.NDArray[Any]]


class GradientsJob(SampleJob[GradientsSpec]):
    """A shard is a range of rows of all arrays."""

    spec_type = GradientsSpec

    @property
    def title(self) -> str:
        return f"gradients {self.spec.task.slug} {self.spec.outputs}x{self.spec.inputs}"

    @staticmethod
    def inputs(spec: GradientsSpec) -> tuple[AnySpec, ...]:
        return trained_inputs((spec.checkpoint,))

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.spec.checkpoint,)

    @property
    def passes(self) -> int:
        return self.spec.noise_draws

    @property
    def num_rows(self) -> int:
        queries = self.spec.queries
        return super().num_rows if queries is None else len(queries.items)

    def layouts(self) -> tuple[ArrayLayout, ...]:
        spec, n, sizes = self.spec, self.num_rows, self._sizes
        rows = chunk_rows(n, max(row_bytes(size, spec.stored) for size in sizes.values()))
        what = "loss" if spec.queries is None else spec.queries.quantity
        found = [
            ArrayLayout(
                name=gradients_name(group),
                shape=(n, code_shape(size, spec.stored)),
                row_axis=0,
                chunk_rows=rows,
                dims=("sample" if spec.queries is None else "query", "number"),
                dtype=CODES[spec.stored],
                attributes={
                    "quantity": f"random projection of the gradient of the {what}",
                    "layer": group,
                    "numbers": size,
                    "stored": spec.stored,
                },
            )
            for group, size in sizes.items()
        ]
        singles = {LOSSES_OF_ROWS: f"{what} of the row"}
        if spec.stored != "float32":
            singles |= {scales_name(group): "factor of the row's codes" for group in sizes}
        found += [
            ArrayLayout(
                name=name,
                shape=(n,),
                row_axis=0,
                chunk_rows=rows,
                dims=("sample" if spec.queries is None else "query",),
                attributes={"quantity": quantity},
            )
            for name, quantity in singles.items()
        ]
        return tuple(found)

    def run(self, shard: Shard, progress: Progress) -> Result:
        progress(0)
        self.load(self.spec.checkpoint)
        if self.spec.queries is not None:
            rows, losses = self._of_queries(shard, progress)
        else:
            rows, losses = self._of_samples(shard, progress)
        found: Rows = {LOSSES_OF_ROWS: losses}
        for group, values in rows.items():
            codes, scales = packed(values, self.spec.stored)
            found[gradients_name(group)] = codes
            if self.spec.stored != "float32":
                found[scales_name(group)] = scales
        return Result(found)

    def _of_samples(self, shard: Shard, progress: Progress) -> tuple[Rows, npt.NDArray[Any]]:
        done, total, losses = 0, dict[str, npt.NDArray[np.float64]](), np.zeros(())
        for draw in range(self.spec.noise_draws):
            pieces: dict[str, list[npt.NDArray[Any]]] = {group: [] for group in self._sizes}
            of_batches = []
            for ids, batch in self.loaded(self.batches(shard), Draw(self.spec.seed, draw)):
                rows, losses_B = self._projected(ids, batch)
                for group, values in rows.items():
                    pieces[group].append(values)
                of_batches.append(losses_B)
                done += len(ids)
                progress(done)
            for group, parts in pieces.items():
                values = np.concatenate(parts, dtype=np.float64) / self.spec.noise_draws
                total[group] = total[group] + values if group in total else values
            losses = losses + np.concatenate(of_batches) / self.spec.noise_draws
        return total, losses

    def _of_queries(self, shard: Shard, progress: Progress) -> tuple[Rows, npt.NDArray[Any]]:
        queries = self.spec.queries
        assert queries is not None
        require_queries(self.task, queries)
        rows: dict[str, list[npt.NDArray[Any]]] = {group: [] for group in self._sizes}
        values = []
        for i in range(shard.start, shard.stop):  # one by one: a gradient may be gigabytes
            gradient_P = query_gradients(self.task, self.model, self._space, queries, i, i + 1)
            parts = self._space.split(gradient_P)
            for group, maps in self._projections.items():
                projected = [
                    one.to(gradient_P.device, torch.float64)(parts[name].double())
                    for name, one in maps.items()
                ]
                rows[group].append(torch.stack(projected).sum(0).flatten(1).cpu().numpy())
            values.append(self._measured(i))
            progress(i + 1 - shard.start)
        return {group: np.concatenate(parts) for group, parts in rows.items()}, np.array(values)

    def _measured(self, i: int) -> float:
        """The quantity of a query, mean over noise draws."""
        queries = self.spec.queries
        assert queries is not None
        query, total = queries.items[i], 0.0
        for draw in range(queries.noise_draws):
            batch = self.task.test_batch(torch.tensor([query.test]), Draw(queries.seed, draw))
            batch = to_type(to_device(batch, self.device), next(self.model.parameters()).dtype)
            with torch.no_grad():
                measured = self.task.measure(self.model, batch, queries.quantity, query.region)
            total += float(measured.sum()) / queries.noise_draws
        return total

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.spec.precision == "float64" else torch.float32

    @cached_property
    def _space(self) -> ParameterSpace:
        return ParameterSpace(self.model, self.spec.modules)

    @cached_property
    def _projections(self) -> dict[str, dict[str, Projection]]:
        spec = self.spec
        return projections(
            self.model,
            self._space,
            outputs=spec.outputs,
            inputs=spec.inputs,
            distribution=spec.distribution,
            seed=spec.seed,
            whole=spec.whole,
        )

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """D by group."""
        return {
            group: projected_size(maps, self._space) for group, maps in self._projections.items()
        }

    @cached_property
    def _engine(self) -> GradProjections:
        engine = GradProjections(
            self.model,
            self._space,
            self.task.losses,
            self._projections,
            precision=self.spec.precision,
        )
        # Once a worker: hooks do not see every use that a model makes of its weights.
        first = torch.arange(min(2, self.num_rows))
        batch = self.batch(first, Draw(self.spec.seed))
        engine.check(batch)
        for line in slow_lines(engine.slow_layers(batch)):
            log.info(line)
        return engine

    def _projected(self, ids: torch.Tensor, batch: Batch) -> tuple[Rows, npt.NDArray[Any]]:
        rows = {group: values.cpu().numpy() for group, values in self._engine(batch).items()}
        for group, values in rows.items():
            self.require_finite(f"the gradient of layer {group}", values, ids)
        return rows, self._engine.losses_B.double().cpu().numpy()

    @cached_property
    def _probed(self) -> list[Rows]:
        """Rows of the probe, filled as it goes."""
        return []

    def probe(self) -> Iterator[float]:
        if self.spec.queries is not None:
            return
        for ids, batch in self.loaded(self.all_batches(), Draw(self.spec.seed)):
            rows, _ = self._projected(ids, batch)
            if sum(len(next(iter(seen.values()))) for seen in self._probed) < PROBED_ROWS:
                self._probed.append(rows)
            yield len(ids)

    def notes(self) -> Sequence[str]:
        if not self._probed:
            return ()
        rows = [np.concatenate([seen[group] for seen in self._probed]) for group in self._sizes]
        return rounding_lines(rows, chosen=self.spec.stored)

    def finish(self) -> Result:
        if self.spec.queries is None:
            return super().finish()
        return Result(files=write_queries(self.run_store, self.task, self.spec.queries))
