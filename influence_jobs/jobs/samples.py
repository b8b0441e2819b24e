"""Jobs whose shards are ranges of training samples that pass through the model in batches."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from influence_jobs.errors import DataError
from influence_jobs.jobs.base import Job, Plan, Result, Shard
from influence_jobs.jobs.rows import Checks
from influence_jobs.kinds.train.spec import Checkpoint, TrainedCheckpoint
from influence_jobs.specs.base import Spec
from influence_jobs.store.checkpoints import load_checkpoint, recorded_digest
from influence_jobs.store.layout import ArrayLayout
from influence_jobs.tasks.base import READING, Batch, Draw, some_ids
from influence_jobs.tasks.layout import in_fast_layout
from influence_jobs.tasks.lengths import by_length, pads
from influence_jobs.tasks.placement import converted, to_device
from influence_jobs.terms import JobPrecision, Precision
from influence_jobs.transfers import loader_for

MAX_SHARDS = 256  # a stop loses at most one shard a worker; more shards add overhead
MAX_SHARD_BYTES = 64 * 2**20  # of its rows, unless one chunk has more: memory must not grow with N

CHECKED = 8  # samples on which an engine is compared with plain autograd

S = TypeVar("S", bound=Spec)
T = TypeVar("T")


class SampleJob(Job[S]):
    """Base of jobs that compute something for every training sample."""

    #: Whether the samples themselves are computed with, or else rows of other runs, in their order.
    reads_samples: ClassVar[bool] = True
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
        wanted = shard_rows or min(math.ceil(n / MAX_SHARDS), MAX_SHARD_BYTES // row_bytes(arrays))
        rows = math.ceil(max(1, wanted) / chunk) * chunk
        shards = tuple(
            Shard(f"{start:09d}-{min(start + rows, n):09d}", start, min(start + rows, n))
            for start in range(0, n, rows)
        )
        return Plan(arrays, shards, units=n * self.passes, batch_size=self.batch_size)

    def each(
        self,
        shard: Shard,
        draw: Draw,
        function: Callable[[torch.Tensor, Any], T],
        fetch: Callable[[torch.Tensor, Draw], Any] | None = None,
    ) -> Iterator[tuple[torch.Tensor, T]]:
        """Apply a function to the samples of a shard, batch by batch.

        A batch that does not fit into memory is halved; see `BatchSize.map`. Samples of one length
        share batches. No batch crosses a chunk, so the bytes do not depend on shard bounds.

        Args:
            shard: Some rows.
            draw: Of the samples' noise.
            function: Of ids (B,) and their samples.
            fetch: In place of `batch`, of ids and draw.

        Yields:
            The ids of a batch, in any order, and what the function gave for them.

        Raises:
            DataError: One sample alone does not fit.
        """
        return self.batching.map(
            function,
            self.chunks(shard),
            fetch=lambda ids: (fetch or self.batch)(ids, draw),
            loader=loader_for(self.device),
        )

    def chunks(self, shard: Shard) -> Iterator[torch.Tensor]:
        """Ids of a shard by chunk; where batches are padded, samples of one length together."""
        for first in range(shard.start, shard.stop, self.chunk_rows):
            ids = torch.arange(first, min(first + self.chunk_rows, shard.stop))
            if self.reads_samples and self._pads:
                if first not in self._by_length:
                    self._by_length[first] = by_length(self.task, ids)
                ids = self._by_length[first]
            yield ids

    def all_batches(self) -> Iterator[torch.Tensor]:
        """Ids by batch, in an endless loop, for probes; where batches are padded, long and short.

        Each has the size that `batching` has by then.
        """
        n = self.num_rows
        while True:
            padded = self.reads_samples and self._pads
            for ids in self.chunks(Shard("", 0, n)) if padded else [torch.arange(n)]:
                left = ids
                while len(left):
                    size = self.batching.size
                    yield left[:size]
                    left = left[size:].flip(0)  # the longest first, then the shortest

    @cached_property
    def _pads(self) -> bool:
        return pads(self.task)

    @cached_property
    def _by_length(self) -> dict[int, torch.Tensor]:
        """Ids of chunks by their first id, filled on demand: several passes need them."""
        return {}

    @cached_property
    def chunk_rows(self) -> int:
        """Rows in a chunk of the arrays, which are the most in a batch."""
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
    def _built(self) -> tuple[torch.nn.Module, Callable[[Batch], Batch]]:
        """The model, and what brings samples into a type that it takes."""
        model, fitting = converted(self.task, self.device, self.dtype)
        return in_fast_layout(self.task, model), fitting

    def load(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint's weights into the model."""
        if checkpoint is not self._loaded:
            load_checkpoint(self.model, self.run_store.root, checkpoint)
            self._loaded = checkpoint

    def batch(self, ids: torch.Tensor, draw: Draw) -> Batch:
        """Training samples, as attribution uses them, on the device."""
        return self.placed(self.read(ids, draw))

    def read(self, ids: torch.Tensor, draw: Draw) -> Batch:
        """Training samples as the task gives them."""
        with READING:
            return self.task.batch(ids, draw)

    def placed(self, batch: Batch) -> Batch:
        """What was read, on the device, in the dtype of the computation."""
        fitting = self._built[1]
        return fitting(to_device(batch, self.device))

    def check(self, check: Callable[[Batch], None], seed: int) -> None:
        """Let an engine's `check` compare it with plain autograd on a few samples, once for all.

        Hooks do not see every use that a model makes of its weights, nor the order in which a layer
        has the samples. So these are from all over the data, and in no order.

        Raises:
            ModelError: As `check`.
        """
        for _ in self.batching.map(
            lambda _, batch: check(batch),
            [some_ids(len(self.task.train_data()), CHECKED)],
            fetch=lambda ids: self.batch(ids, Draw(seed)),
        ):
            pass

    def checks(self, shard: Shard | None) -> Checks:
        """Checks of a shard's numbers that name its samples; None: of a probe's."""
        return Checks(shard, self._refuse_samples)

    def _refuse_samples(self, what: str, ids: torch.Tensor) -> None:
        """Refuse samples of which something is not finite.

        Raises:
            DataError: The message names the first of them.
        """
        found = ids.numpy()
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


def row_bytes(arrays: Iterable[ArrayLayout]) -> int:
    """Bytes of a row of all arrays together, as they are stored."""
    return sum(
        np.dtype(array.dtype).itemsize * math.prod(array.shape) // array.shape[array.row_axis]
        for array in arrays
    )


def dtype_for(precision: JobPrecision) -> torch.dtype:
    """Of the weights, for a precision of a job."""
    if precision == "bfloat16-weights":
        return torch.bfloat16
    return torch.float64 if precision == "float64" else torch.float32


def engine_precision(precision: JobPrecision) -> Precision:
    """Of the engine, for a precision of a job."""
    return "bfloat16" if precision == "bfloat16-weights" else precision


def trained_inputs(checkpoints: tuple[Checkpoint, ...]) -> tuple[Any, ...]:
    """The train runs of the checkpoints, each once."""
    trained = [c.train for c in checkpoints if isinstance(c, TrainedCheckpoint)]
    return tuple({train.run_id: train for train in trained}.values())
