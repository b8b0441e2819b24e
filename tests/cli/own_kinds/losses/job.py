"""Losses of the training samples."""

from collections.abc import Iterator

import torch

from influence_jobs.jobs.base import Progress, Result, Shard
from influence_jobs.jobs.rows import Rows
from influence_jobs.jobs.samples import SampleJob, trained_inputs
from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.layout import ArrayLayout, chunk_rows
from influence_jobs.tasks.base import Batch, Draw

from .spec import LossesSpec


class LossesJob(SampleJob[LossesSpec]):
    """One number a sample."""

    spec_type = LossesSpec
    passes = 1
    title = "losses"

    @staticmethod
    def inputs(spec: LossesSpec) -> tuple[AnySpec, ...]:
        return trained_inputs((spec.checkpoint,))

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.spec.checkpoint,)

    def layouts(self) -> tuple[ArrayLayout, ...]:
        n = len(self.task.train_data())
        meaning = {"quantity": "the sample's loss", "unit": "loss"}
        return (ArrayLayout("losses", (n,), 0, chunk_rows(n, 4), ("sample",), meaning),)

    @torch.no_grad()
    def run(self, shard: Shard, progress: Progress) -> Result:
        self.load(self.spec.checkpoint)
        rows = Rows(shard)
        for ids, losses in self.each(shard, Draw(0), self._losses):
            rows.add(ids, {"losses": losses})
        progress(shard.stop - shard.start)
        return Result(rows.arrays())

    @torch.no_grad()
    def probe(self) -> Iterator[int]:
        for ids in self.all_batches():
            yield len(self._losses(ids, self.batch(ids, Draw(0))))

    def _losses(self, ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.task.losses(self.model, batch)
