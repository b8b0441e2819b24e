"""The base of all jobs. A job cuts a spec into shards and can compute each shard on its own.

A shard owns whole chunks of the run's arrays. Its bytes do not depend on the worker, the order of
the shards, or other shards. So work can be interrupted, repeated and spread over workers.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from influence_jobs.memory import BatchSize
from influence_jobs.specs.base import AnySpec, Spec
from influence_jobs.specs.queries import Queries
from influence_jobs.store.layout import ArrayLayout
from influence_jobs.store.run import BLOCK_ROWS, Run
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.registry import make_task

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class Shard:
    """Rows start..stop of a run, computed as one piece.

    The names of the fields are keys of plan.json.

    Attributes:
        part: First repeat of these rows in this shard, for a job that repeats its rows.
        parts: Number of repeats in this shard.
    """

    id: str
    start: int
    stop: int
    part: int = 0
    parts: int = 1

    @property
    def repeats(self) -> range:
        """The repeats in this shard."""
        return range(self.part, self.part + self.parts)


@dataclass(frozen=True)
class Plan:
    """How a job is carried out. A plan does not change the result.

    Attributes:
        units: Work of the whole job: samples times passes through the model.
        batch_size: Samples in a batch.
        file_bytes: Size of the files besides the arrays, if it is large.
    """

    arrays: tuple[ArrayLayout, ...]
    shards: tuple[Shard, ...]
    units: int
    batch_size: int
    file_bytes: int = 0

    @property
    def disk_bytes(self) -> int:
        """Bytes that the job writes, before compression."""
        sizes = (np.dtype(array.dtype).itemsize * math.prod(array.shape) for array in self.arrays)
        return self.file_bytes + sum(sizes)

    @property
    def largest_shard_bytes(self) -> int:
        """Memory of the rows of the largest shard: in float64, and once as they are stored."""
        rows = max((shard.stop - shard.start for shard in self.shards), default=0)
        held = 0
        for array in self.arrays:
            stored = math.prod(array.shape) // array.shape[array.row_axis]
            numbers = array.attributes.get("numbers", stored)  # of codes: what they stand for
            if not isinstance(numbers, int):
                numbers = stored
            held += rows * (8 * numbers + np.dtype(array.dtype).itemsize * stored)
        return held


@dataclass(frozen=True)
class Result:
    """The result of a shard.

    Attributes:
        arrays: Rows of each array, in the array's dtype or wider.
        files: SHA-256 by name of each file that the job wrote for the shard.
        tables: Tables by name, which are written when it is sure that no other worker was faster.
    """

    arrays: Mapping[str, npt.NDArray[np.floating[Any]]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, pa.Table] = field(default_factory=dict)


@dataclass(frozen=True)
class Receipt:
    """A worker's message to the driver about a shard, without the data.

    Attributes:
        error: One line for people, if the shard failed.
        kind: A `user` error comes back at every attempt, a `transient` error may not. After an
            error of the `worker` its process cannot go on, but another one may. After a `fatal`
            error no shard can succeed.
        attempt: Number of attempts at the shard so far.
        seconds: Time of this attempt.
        units: Samples that this attempt passed through the model; 0 if the shard was already done.
        worker: Host and process that did the shard, as HOST:PID; empty if it failed.
    """

    shard: str
    status: Literal["done", "failed"]
    error: str | None = None
    kind: Literal["user", "transient", "worker", "fatal"] | None = None
    attempt: int = 1
    seconds: float = 0.0
    units: int = 0
    worker: str = ""


# Takes the units of the shard done so far. The first call has the units of earlier attempts.
Progress = Callable[[int], None]


class Job(ABC, Generic[S]):
    """Computes the arrays and tables of a run from its spec.

    Args:
        run: The run to compute.
        device: The device to compute on.
        batch_size: Samples in a batch; the task's default if None.
    """

    spec_type: ClassVar[type[Spec]]
    reads_data: ClassVar[bool] = True  # or, if not, only other runs

    @property
    def tf32(self) -> bool:
        """Whether GPUs may round the factors of float32 products to TF32."""
        return getattr(self.spec, "precision", None) == "tf32"

    @property
    def tells_progress(self) -> bool:
        """Whether a shard without progress for long hangs; a task's own training tells none."""
        return True

    def __init__(self, run: Run, *, device: torch.device, batch_size: int | None = None):
        # Torch warns about its own code at the first forward-mode differentiation.
        warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
        self.run_store = run
        self.spec: S = run.spec  # type: ignore[assignment]
        self.device = device
        self._batch_size = batch_size

    @cached_property
    def task(self) -> Task:
        """The task, with its data."""
        return make_task(self.spec.task)

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        return self._batch_size or self.task.batch_size

    @cached_property
    def batching(self) -> BatchSize:
        """The samples of a batch now: fewer than `batch_size` once that many did not fit."""
        return BatchSize(self.batch_size)

    @property
    def used_batch_size(self) -> int:
        """The samples of a batch now, if anything was computed in batches; else 0."""
        return self.batching.size if "batching" in vars(self) else 0

    def apart(self) -> Self:
        """The same job with the same data and a model of its own, for measuring."""
        other = type(self)(self.run_store, device=self.device, batch_size=self._batch_size)
        other.task = self.task
        return other

    @property
    @abstractmethod
    def title(self) -> str:
        """A few words for dashboards and logs, e.g. `grad-norms ffdnet main.29`."""

    @staticmethod
    @abstractmethod
    def inputs(spec: Any) -> tuple[AnySpec, ...]:
        """Specs of the runs that must be done before this one."""

    @abstractmethod
    def plan(self, shard_rows: int | None = None) -> Plan:
        """Plan the arrays and shards. Shards are rounded up to whole chunks."""

    @abstractmethod
    def run(self, shard: Shard, progress: Progress) -> Result:
        """Compute one shard."""

    @abstractmethod
    def probe(self) -> Iterator[float]:
        """Do some of the work without writing, for measuring; yields the units of each piece.

        It yields nothing if the work has no pieces, such as a training by the task itself.
        """

    def held_bytes(self, plan: Plan) -> int:
        """The most memory of what a shard keeps, besides the model, the data and a batch."""
        return plan.largest_shard_bytes

    def input_digests(self) -> dict[str, str]:
        """SHA-256 by name of everything that this run reads from other runs.

        The driver compares them, so that a run never mixes two versions of its inputs.
        """
        return {}

    @property
    def tests(self) -> Sequence[int]:
        """Ids of the test samples that its queries are of, each once."""
        queries = getattr(self.spec, "queries", None)
        return [] if queries is None else [*dict.fromkeys(query.test for query in queries.items)]

    def of_test(self, test: int) -> Any:
        """What is read of a query's test sample."""
        queries: Queries = self.spec.queries  # type: ignore[attr-defined]
        return self.task.test_batch(torch.tensor([test]), Draw(queries.seed))

    def notes(self) -> Sequence[str]:
        """What a user may want to know of how this is carried out, a line each; after `probe`."""
        return ()

    def sweep(self) -> None:
        """Remove files that killed workers left outside the run's folder."""

    def finish(self) -> Result:
        """Do the work that needs all shards; returns whole small arrays and the tables."""
        return Result()

    def write_samples(self) -> dict[str, str]:
        """Write the table that describes each row's sample, so that results need no data."""
        n = len(self.task.train_data())
        starts = range(0, max(1, n), BLOCK_ROWS)
        blocks = (self._described(start, min(start + BLOCK_ROWS, n)) for start in starts)
        try:
            return self.run_store.write_table_in_blocks("samples", blocks)
        except pa.ArrowException:
            # A column has another type further on, such as after a block of None: all at once.
            return self.run_store.write_table("samples", self._described(0, n))

    def _described(self, start: int, stop: int) -> pa.Table:
        ids = np.arange(start, stop)
        # A column of the task's own with this name would take the place of the ids.
        return pa.table({"sample": ids, **self.task.describe(ids)} | {"sample": ids})
