"""One shape for all work: a Job cuts a spec into shards and computes any of them on its own.

A shard owns whole chunks of the run's arrays and gives the same bytes whoever computes it, in whatever order, batch and
company. That is what makes work safe to interrupt, repeat and spread.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from influence_jobs.specs.base import AnySpec, Spec
from influence_jobs.store.layout import ArrayLayout
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.registry import make_task

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class Shard:
    """Rows start..stop of a run, computed as one piece.

    Attributes:
        part: Which repetition of those rows, for a job that has several; the first, if the shard has more than one.
        parts: How many repetitions.
    """

    id: str
    start: int
    stop: int
    part: int = 0
    parts: int = 1

    @property
    def repetitions(self) -> range:
        """All that it has."""
        return range(self.part, self.part + self.parts)


@dataclass(frozen=True)
class Plan:
    """How a job is carried out; none of it changes the result.

    Attributes:
        units: Work of the whole job in samples, each counted as often as it is passed through the model.
        batch_size: Samples a pass.
        file_bytes: Size of files that it writes besides the arrays, where that is much.
    """

    arrays: tuple[ArrayLayout, ...]
    shards: tuple[Shard, ...]
    units: int
    batch_size: int
    file_bytes: int = 0

    @property
    def disk_bytes(self) -> int:
        """Bytes of what it writes, before compression."""
        sizes = (np.dtype(array.dtype).itemsize * math.prod(array.shape) for array in self.arrays)
        return self.file_bytes + sum(sizes)


@dataclass(frozen=True)
class Result:
    """What a shard gives.

    Attributes:
        arrays: Rows of each array, in the array's dtype or wider.
        files: SHA-256 of each file the job wrote for the shard, by name.
    """

    arrays: Mapping[str, npt.NDArray[np.floating[Any]]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Receipt:
    """What a worker tells the driver about a shard: never the data.

    Attributes:
        error: One line for a person, if it failed.
        kind: `user` errors come back however often they are tried, `transient` ones may not, after a `fatal` one
            no shard can succeed.
        attempt: How often the shard was started so far.
        units: Samples passed through the model by this attempt; 0 if the shard was done already.
    """

    shard: str
    status: Literal["done", "failed"]
    error: str | None = None
    kind: Literal["user", "transient", "fatal"] | None = None
    attempt: int = 1
    seconds: float = 0.0
    units: int = 0


# Takes the units of the shard done so far; first called with what earlier attempts had left.
Progress = Callable[[int], None]


class Job(ABC, Generic[S]):
    """A unit of work: from a spec to the arrays of its run.

    Args:
        run: The run to fill; its spec says what to do.
        device: Where to compute.
        batch_size: Samples a pass; the task's own default if None.
    """

    spec_type: ClassVar[type[Spec]]

    def __init__(self, run: Run, *, device: torch.device, batch_size: int | None = None):
        # Torch warns of itself when it first differentiates in forward mode.
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
        """Samples a pass."""
        return self._batch_size or self.task.batch_size

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
        """Arrays and shards. Shards are rounded up to whole chunks."""

    @abstractmethod
    def run(self, shard: Shard, progress: Progress) -> Result:
        """Compute one shard."""

    @abstractmethod
    def probe(self) -> Iterator[int]:
        """Do a little of the work without writing; yields the units of each piece done."""

    def input_digests(self) -> dict[str, str]:
        """SHA-256 of what this run reads of other runs, by name; one run never mixes two versions of it."""
        return {}

    def sweep(self) -> None:
        """Remove what killed workers left outside the run's folder."""

    def finish(self) -> Result:
        """What needs all shards: whole small arrays to write, and the tables it has written."""
        return Result()

    def write_samples(self) -> dict[str, str]:
        """Write the table that tells which sample each row is, so that results can be read without the data."""
        ids = np.arange(len(self.task.train_data()))
        columns = {"sample": ids, **self.task.describe(ids)}
        return self.run_store.write_table("samples", pa.table(columns))
