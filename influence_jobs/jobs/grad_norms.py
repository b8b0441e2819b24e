"""Replay: per-sample gradient norms of chosen layers at saved checkpoints."""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import _pytree as pytree

from influence_jobs.errors import DataError
from influence_jobs.gradients import GradNorms
from influence_jobs.jobs.base import Job, Plan, Report, Result, Shard
from influence_jobs.jobs.checkpoints import load_checkpoint, recorded_digest
from influence_jobs.jobs.norm_arrays import norm_layouts
from influence_jobs.specs import AnySpec, FileCheckpoint, GradNormsSpec, TrainedCheckpoint
from influence_jobs.store.layout import norms_name
from influence_jobs.tasks.base import Batch, Draw, to_device

MAX_SHARDS = 256  # a stop loses at most one shard a worker; more shards only cost overhead


class GradNormsJob(Job[GradNormsSpec]):
    """Shards are row ranges of all arrays."""

    spec_type = GradNormsSpec
    _loaded: TrainedCheckpoint | FileCheckpoint | None = None  # whose weights the model has

    @property
    def title(self) -> str:
        return f"grad-norms {self.spec.task.slug} {','.join(self.spec.layers)}"

    @staticmethod
    def inputs(spec: GradNormsSpec) -> tuple[AnySpec, ...]:
        trained = [c.train for c in spec.checkpoints if isinstance(c, TrainedCheckpoint)]
        return tuple({train.run_id: train for train in trained}.values())

    def plan(self, shard_rows: int | None = None) -> Plan:
        n = len(self.task.train_data())
        several = len(self.spec.checkpoints)
        arrays = norm_layouts(
            self.task.model(),
            self.spec.layers,
            num_samples=n,
            reduction=self.spec.reduction,
            checkpoints=several if self.spec.combine == "keep" else None,
            source="each sample's own loss, model in eval mode"
            + (
                f", summed over {several} checkpoints"
                if self.spec.combine == "sum" and several > 1
                else ""
            ),
        )
        chunk = arrays[0].chunk_rows
        wanted = shard_rows or math.ceil(n / MAX_SHARDS)
        rows = math.ceil(wanted / chunk) * chunk
        shards = tuple(
            Shard(f"{start:09d}-{min(start + rows, n):09d}", start, min(start + rows, n))
            for start in range(0, n, rows)
        )
        return Plan(arrays, shards, units=n * several, batch_size=self.batch_size)

    def run(self, shard: Shard, report: Report) -> Result:
        report(done := 0)
        total: dict[str, npt.NDArray[np.float64]] = {}
        kept: dict[str, list[npt.NDArray[Any]]] = {layer: [] for layer in self.spec.layers}
        for checkpoint in self.spec.checkpoints:
            self._load(checkpoint)
            pieces: dict[str, list[npt.NDArray[Any]]] = {layer: [] for layer in self.spec.layers}
            for ids in self._batches(shard):
                for layer, values in self._norms(ids).items():
                    pieces[layer].append(values)
                done += len(ids)
                report(done)
            for layer in self.spec.layers:
                values = np.concatenate(pieces[layer])
                if self.spec.combine == "keep":
                    kept[layer].append(values)
                else:
                    # In float64: summing must not add rounding of its own to the stored float32.
                    total[layer] = total.get(layer, 0.0) + values.astype(np.float64)
        if self.spec.combine == "keep":
            return Result({norms_name(layer): np.stack(rows) for layer, rows in kept.items()})
        return Result({norms_name(layer): values for layer, values in total.items()})

    def _load(self, checkpoint: TrainedCheckpoint | FileCheckpoint) -> None:
        if checkpoint is not self._loaded:
            load_checkpoint(self._model, self.run_store.root, checkpoint)
            self._loaded = checkpoint

    def _batches(self, shard: Shard) -> Iterator[torch.Tensor]:
        """Ids by batch; a batch never crosses a chunk, so that shard bounds leave no trace in the bytes."""
        for first in range(shard.start, shard.stop, self._chunk_rows):
            last = min(first + self._chunk_rows, shard.stop)
            yield from _split(first, last, self.batch_size)

    @cached_property
    def _chunk_rows(self) -> int:
        return self.plan().arrays[0].chunk_rows

    @cached_property
    def _model(self) -> torch.nn.Module:
        model = self.task.model().to(self.device, self._dtype).eval()
        # Convolutions and the rule for their norms are faster on it; other layers do not mind.
        return model.to(memory_format=torch.channels_last)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.spec.precision == "float64" else torch.float32

    @cached_property
    def _engine(self) -> GradNorms:
        engine = GradNorms(
            self._model,
            self.spec.layers,
            self.task.losses,
            reduction=self.spec.reduction,
            precision=self.spec.precision,
        )
        # Once a worker: hooks cannot see every way a model may use its weights.
        engine.check(self._batch(torch.arange(min(2, len(self.task.train_data())))))
        return engine

    def _batch(self, ids: torch.Tensor) -> Batch:
        batch = to_device(self.task.batch(ids, Draw(self.spec.seed)), self.device)
        if self._dtype is torch.float32:
            return batch
        return pytree.tree_map_only(
            torch.Tensor, lambda t: t.to(self._dtype) if t.is_floating_point() else t, batch
        )

    def _norms(self, ids: torch.Tensor) -> dict[str, npt.NDArray[Any]]:
        engine = self._engine
        norms = {layer: v.cpu().numpy() for layer, v in engine(self._batch(ids)).items()}
        for layer, values in norms.items():
            bad = ~np.isfinite(values).reshape(len(ids), -1).all(axis=1)
            if bad.any():
                raise DataError(_not_finite(self.task, layer, ids.numpy()[bad]))
        return norms

    def probe(self) -> Iterator[int]:
        # With untrained weights: the checkpoint may not exist yet, and the time is the same.
        n = len(self.task.train_data())
        while True:
            for ids in _split(0, n, self.batch_size):
                self._norms(ids)
                yield len(ids)

    def input_digests(self) -> dict[str, str]:
        root = self.run_store.root
        trained = [c for c in self.spec.checkpoints if isinstance(c, TrainedCheckpoint)]
        return {f"{c.train.run_id}@{c.epoch}": recorded_digest(root, c) for c in trained}

    def finish(self) -> dict[str, str]:
        return self.write_samples()


def _split(start: int, stop: int, size: int) -> Iterator[torch.Tensor]:
    for first in range(start, stop, size):
        yield torch.arange(first, min(first + size, stop))


def _not_finite(task: Any, layer: str, ids: npt.NDArray[np.int64]) -> str:
    columns = task.describe(ids[:1])
    which = ", ".join(f"{name} {values[0]}" for name, values in columns.items())
    more = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
    return (
        f"the gradient of layer {layer} is not finite for sample {ids[0]}"
        f"{f' ({which})' if which else ''}{more}: check the sample and the checkpoint"
    )
