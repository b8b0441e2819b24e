"""Jobs whose shards are ranges of training samples that pass through the model in batches."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from influence_jobs.errors import DataError
from influence_jobs.jobs.base import Job, Plan, Result, Shard
from influence_jobs.kinds.train.spec import Checkpoint, TrainedCheckpoint
from influence_jobs.specs.base import Spec
from influence_jobs.store.checkpoints import load_checkpoint, recorded_digest
from influence_jobs.store.layout import ArrayLayout
from influence_jobs.tasks.base import Batch, Draw, converted, to_device, to_type
from influence_jobs.tasks.layout import in_fast_layout

MAX_SHARDS = 256  # a stop loses at most one shard a worker; more shards add overhead

S = TypeVar("S", bound=Spec)
T = TypeVar("T")


class SampleJob(Job[S]):
    """Base of jobs that compute something for every training sample."""

    _loaded: Checkpoint | None = None  # the checkpoint whose weights the model has

    @abstractmethod
    def layouts(self) -> tuple[ArrayLayout, ...]:
        """The layouts of the arrays, all with the same number of samples in a chunk."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Number of passes of every sample through the model."""

    @property
    @abstractmethod
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that the job reads."""

    @property
    def num_rows(self) -> int:
        """Number of rows of the arrays: N."""
        return len(self.task.train_data())

    def plan(self, shard_rows: int | None = None) -> Plan:
        n = self.num_rows
        arrays = self.layouts()
        chunk = arrays[0].chunk_rows
        wanted = shard_rows or math.ceil(n / MAX_SHARDS)
        rows = math.ceil(wanted / chunk) * chunk
        shards = tuple(
            Shard(f"{start:09d}-{min(start + rows, n):09d}", start, min(start + rows, n))
            for start in range(0, n, rows)
        )
        return Plan(arrays, shards, units=n * self.passes, batch_size=self.batch_size)

    def batches(self, shard: Shard) -> Iterator[torch.Tensor]:
        """Ids by batch. No batch crosses a chunk, so the bytes do not depend on shard bounds."""
        for first in range(shard.start, shard.stop, self._chunk_rows):
            last = min(first + self._chunk_rows, shard.stop)
            yield from _split(first, last, self.batch_size)

    def all_batches(self) -> Iterator[torch.Tensor]:
        """Ids by batch, in an endless loop, for probes."""
        while True:
            yield from _split(0, self.num_rows, self.batch_size)

    @cached_property
    def _chunk_rows(self) -> int:
        return self.plan().arrays[0].chunk_rows

    @property
    def dtype(self) -> torch.dtype | None:
        """Of weights and samples in the computation; None for `dtype_of` the model as built."""
        return None

    @property
    def model(self) -> torch.nn.Module:
        """The model in eval mode, untrained or with the weights that were loaded last."""
        return self._built[0]

    @cached_property
    def _built(self) -> tuple[torch.nn.Module, bool]:
        """The model, and whether the task makes it, and so its samples, in another dtype."""
        model, converts = converted(self.task, self.device, self.dtype)
        return in_fast_layout(self.task, model), converts

    def load(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint's weights into the model."""
        if checkpoint is not self._loaded:
            load_checkpoint(self.model, self.run_store.root, checkpoint)
            self._loaded = checkpoint

    def batch(self, ids: torch.Tensor, draw: Draw) -> Batch:
        """Training samples, as attribution uses them, on the device."""
        batch = to_device(self.task.batch(ids, draw), self.device)
        model, converts = self._built
        return to_type(batch, next(model.parameters()).dtype) if converts else batch

    def loaded(
        self, pieces: Iterable[torch.Tensor], draw: Draw
    ) -> Iterator[tuple[torch.Tensor, Batch]]:
        """Ids with their samples. For a GPU, a thread fetches the next samples in advance."""
        loaded = ((ids, self.batch(ids, draw)) for ids in pieces)
        # On a CPU the thread would slow the computation down.
        return loaded if self.device.type == "cpu" else ahead(loaded)

    def require_finite(
        self, what: str, values: npt.NDArray[np.floating[Any]], ids: torch.Tensor
    ) -> None:
        """Refuse values (B, ...) with a NaN or infinity.

        Raises:
            DataError: A value is not finite; the message names the first such sample.
        """
        bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if not bad.any():
            return
        found = ids.numpy()[bad]
        columns = self.task.describe(found[:1])
        which = ", ".join(f"{name} {values[0]}" for name, values in columns.items())
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise DataError(
            f"{what} is not finite for sample {found[0]}"
            f"{f' ({which})' if which else ''}{more}: check the sample and the checkpoint"
        )

    def input_digests(self) -> dict[str, str]:
        root = self.run_store.root
        trained = [c for c in self.checkpoints if isinstance(c, TrainedCheckpoint)]
        return {f"{c.train.run_id}@{c.epoch}": recorded_digest(root, c) for c in trained}

    def finish(self) -> Result:
        return Result(files=self.write_samples())


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; a second thread makes each item while the previous one is in use."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield cast(T, item)


def trained_inputs(checkpoints: tuple[Checkpoint, ...]) -> tuple[Any, ...]:
    """The train runs of the checkpoints, each once."""
    trained = [c.train for c in checkpoints if isinstance(c, TrainedCheckpoint)]
    return tuple({train.run_id: train for train in trained}.values())


def _split(start: int, stop: int, size: int) -> Iterator[torch.Tensor]:
    for first in range(start, stop, size):
        yield torch.arange(first, min(first + size, stop))
