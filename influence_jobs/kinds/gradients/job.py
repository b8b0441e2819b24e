"""Projected gradients of training samples, or of queries, at one checkpoint."""

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from influence_jobs.gradients import GradProjections, ParameterSpace
from influence_jobs.gradients.fallback import slow_lines
from influence_jobs.gradients.projections import Projection
from influence_jobs.jobs.base import Progress, Result, Shard
from influence_jobs.jobs.rows import Checks, Rows
from influence_jobs.jobs.samples import (
    SampleJob,
    dtype_for,
    engine_precision,
    trained_inputs,
)
from influence_jobs.kinds.gradients.rows import (
    packed_rows,
    projections_of,
    row_layouts,
    sizes_of,
)
from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.methods.rounding import rounding_lines
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.layout import LOSSES_OF_ROWS, ArrayLayout
from influence_jobs.tasks.base import Batch, Draw
from influence_jobs.transfers import on_cpu

log = logging.getLogger(__name__)

PROBED_ROWS = 1024  # from which the loss by rounding is measured


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

    def layouts(self) -> tuple[ArrayLayout, ...]:
        return row_layouts(
            self.num_rows, self._sizes, stored=self.spec.stored, axis="sample", quantity="loss"
        )

    def run(self, shard: Shard, progress: Progress) -> Result:
        progress(done := 0)
        self.load(self.spec.checkpoint)
        found, losses, draws = Rows(shard), Rows(shard), self.spec.noise_draws
        checks = self.checks(shard)
        for draw in range(draws):
            for ids, (rows, losses_B) in self.each(
                shard, Draw(self.spec.seed, draw), partial(self._projected, checks=checks)
            ):
                found.add(ids, {group: v.double() / draws for group, v in rows.items()})
                losses.add(ids, {LOSSES_OF_ROWS: losses_B / draws})
                done += len(ids)
                progress(done)
        rows_of, losses_of = found.arrays(checks), losses.arrays()
        return Result(packed_rows(rows_of, losses_of[LOSSES_OF_ROWS], stored=self.spec.stored))

    @property
    def dtype(self) -> torch.dtype:
        return dtype_for(self.spec.precision)

    @cached_property
    def _space(self) -> ParameterSpace:
        return ParameterSpace(self.model, self.spec.modules)

    @cached_property
    def _projections(self) -> dict[str, dict[str, Projection]]:
        return projections_of(self.spec, self.model, self._space)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return sizes_of(self._projections)

    @cached_property
    def _engine(self) -> GradProjections:
        engine = GradProjections(
            self.model,
            self._space,
            self.task.losses,
            self._projections,
            precision=engine_precision(self.spec.precision),
        )
        self.check(engine.check, self.spec.seed)
        few = self.batch(torch.arange(min(2, self.num_rows)), Draw(self.spec.seed))
        for line in slow_lines(engine.slow_layers(few)):
            log.info(line)
        return engine

    def _projected(
        self, ids: torch.Tensor, batch: Batch, *, checks: Checks
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Projected gradients (B, D) by group, and the losses (B,)."""
        rows = self._engine(batch)
        for group, values in rows.items():
            checks.finite(f"the gradient of layer {group}", values, ids)
        return rows, self._engine.losses_B.double()

    @cached_property
    def _probed(self) -> list[dict[str, npt.NDArray[Any]]]:
        """Rows of the probe, filled as it goes."""
        return []

    def probe(self) -> Iterator[float]:
        checks = self.checks(None)
        for ids in self.all_batches():
            batch = self.batch(ids, Draw(self.spec.seed))
            rows, _ = self._projected(ids, batch, checks=checks)
            if sum(len(next(iter(seen.values()))) for seen in self._probed) < PROBED_ROWS:
                self._probed.append({group: v.numpy() for group, v in on_cpu(rows).items()})
            yield len(ids)

    def notes(self) -> Sequence[str]:
        if not self._probed:
            return ()
        rows = [np.concatenate([seen[group] for seen in self._probed]) for group in self._sizes]
        return rounding_lines(rows, chosen=self.spec.stored)
