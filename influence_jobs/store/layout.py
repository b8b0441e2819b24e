"""Every name in a run folder, and what its arrays look like.

<runs>/<run id>/
    spec.json           what was asked (specs/); written first; only its paths may change
    plan.json           how it is cut up: shards, batch size; written once
    width.json          how many variants a retraining run trains side by side; measured once
    status.json         what the driver is doing; rewritten about once a second
    lease.json          which driver may write; lease.json.OWNER, who succeeds a dead OWNER
    job.json            the Ray job that runs the driver
    manifest/ID.json    one file a shard: its attempts, and its checksums once its data are written
    progress/ID.json    how far a shard in work has come
    data.zarr/          the arrays
    checkpoints/        weights of a train run, and the states that long shards resume from
    tables/NAME.parquet small tables; tables/solutions/ID.parquet, one an s-test shard
    logs/               what drivers said; shard-ID.log, the traceback of an unexpected error
    report/             what `infl report` wrote; no part of the run
<runs>/retrained-*/     weights of retrained variants, shared by all runs: see store/retrained.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SPEC = "spec.json"
PLAN = "plan.json"
STATUS = "status.json"
LEASE = "lease.json"
JOB = "job.json"
MANIFEST = "manifest"
PROGRESS = "progress"
ARRAYS = "data.zarr"
LOGS = "logs"
TABLES = "tables"
CHECKPOINTS = "checkpoints"
FINISH = "finish"  # the manifest entry of what is written after all shards
TRAINING_STATE = f"{CHECKPOINTS}/state.pt"

MAX_CHUNK_BYTES = 4 * 2**20
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 256, 1024


def checkpoint_name(epoch: int) -> str:
    """Where a train run keeps the weights after an epoch."""
    return f"{CHECKPOINTS}/epoch-{epoch:04d}.pt"


def norms_name(layer: str) -> str:
    """The array that holds a layer's gradient norms."""
    return f"norms/{layer}"


S_TEST = "s_test"
S_TEST_VARIANCE = "variance"
SCORES = "scores"


def repeat_name(repeat: int) -> str:
    """The array of one repeat's s_test vectors."""
    return f"repeats/{repeat}"


def part_name(module: str) -> str:
    """The array of one module's part of the scores."""
    return f"parts/{module}"


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a run.

    Attributes:
        shape: Full shape; one of the axes has the N samples.
        row_axis: Which one that is; in s_test vectors, the axis of queries.
        chunk_rows: Samples in a chunk.
        chunk_leading: Entries in a chunk along each axis before that one. Axes after it are not cut.
        dims: A name for every axis.
        attributes: Unit, sign and source of the numbers, for whoever opens the array later.
    """

    name: str
    shape: tuple[int, ...]
    row_axis: int
    chunk_rows: int
    dims: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    chunk_leading: int = 1

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunk shape."""
        before, after = self.shape[: self.row_axis], self.shape[self.row_axis + 1 :]
        leading = (min(self.chunk_leading, length) for length in before)
        return (*leading, min(self.chunk_rows, self.shape[self.row_axis]), *after)


def chunk_rows(num_rows: int, row_bytes: int) -> int:
    """Rows in a chunk: a power of two that follows from the array alone, never from workers or shards.

    Aims at 32 chunks, so that small sets still spread over workers, within 256 to 1,024 rows and 4 MiB.
    """
    aim = max(MIN_CHUNK_ROWS, min(MAX_CHUNK_ROWS, num_rows // 32))
    fits = max(1, min(aim, MAX_CHUNK_BYTES // max(1, row_bytes)))
    return 1 << (fits.bit_length() - 1)
