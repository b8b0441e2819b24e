"""Every name in a run folder, and the layout of its arrays.

<runs>/<run id>/
    spec.json           the request (specs/); written first; only its paths may change
    plan.json           the shards, the batch size, digests of samples; written once
    batch.json          the batch size, if none was asked for; measured once
    width.json          how many variants a retraining run trains side by side; measured once
    status.json         the state of the driver; rewritten about once a second
    lease.json          the driver that may write; lease.json.OWNER names OWNER's successor if
                        OWNER died
    job.json            the Ray job that runs the driver
    manifest/ID.json    one file per shard: its attempts, and checksums once its data are written
    summary.json        what the manifest of a finished run says in all, so that readers need not
                        read every entry
    progress/ID.json    the progress of a shard that is being computed
    data.zarr/          the arrays
    checkpoints/        weights of a train run, and states from which long shards resume; while an
                        unrolled run is at work, states of the training that it recomputes
    index.faiss         of a gradient-index run
    factors/LAYER.pt    factors of EK-FAC, while an s-test run is at work
    tables/NAME.parquet small tables; tables/solutions/ID.parquet is one table per s-test shard
    logs/               logs of the drivers; shard-ID.log has the traceback of an unexpected error
    report/             pages and figures that `infl report` wrote; not part of the run
<runs>/retrained-*/     weights of retrained variants, shared by all runs: see store/retrained.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SPEC = "spec.json"
PLAN = "plan.json"
BATCH = "batch.json"
STATUS = "status.json"
LEASE = "lease.json"
JOB = "job.json"
MANIFEST = "manifest"
SUMMARY = "summary.json"
PROGRESS = "progress"
CONTESTED = "contested"  # shards that several workers were at, and that are not compared yet
ARRAYS = "data.zarr"
LOGS = "logs"
TABLES = "tables"
CHECKPOINTS = "checkpoints"
FACTORS = "factors"  # of EK-FAC, while a run is at work
FINISH = "finish"  # the manifest entry for everything that is written after all shards
STEP = "step-"  # begins the names of such files; see `step_name`
TRAINING_STATE = f"{CHECKPOINTS}/state.pt"

MAX_CHUNK_BYTES = 4 * 2**20
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 256, 1024
MANY_CHUNKS = 8192  # or up to twice as many, as rows in a chunk are a power of two


def checkpoint_name(epoch: int) -> str:
    """The file in which a train run keeps its weights after an epoch."""
    return f"{CHECKPOINTS}/epoch-{epoch:04d}.pt"


def token_norms_name(layer: str) -> str:
    """The array that holds the norms of a layer's gradient by each token."""
    return f"token_norms/{layer}"


def norms_name(layer: str) -> str:
    """The array that holds a layer's gradient norms."""
    return f"norms/{layer}"


def step_name(step: int) -> str:
    """The file with the state of a training that is recomputed, after so many steps."""
    return f"{CHECKPOINTS}/{STEP}{step:09d}.pt"


S_TEST = "s_test"
S_TEST_VARIANCE = "variance"
SCORES = "scores"
SCORES_OF_TOKENS = "token_scores"
BY_QUERY = "by_query"  # the scores of a job whose shards are queries; a row is a query


def repeat_name(repeat: int) -> str:
    """The array of one repeat's s_test vectors."""
    return f"repeats/{repeat}"


def segment_name(segment: int) -> str:
    """The array of the s_test vectors of one segment of a training, counted from 0."""
    return f"segments/{segment + 1}"


SELF_INFLUENCE = "self_influence"
LABELS = "labels"
PREDICTED = "predicted"
PROBABILITY = "probability"
GRAM = "gram"
LOSSES_OF_ROWS = "losses"
INDEX = "index.faiss"


def gradients_name(group: str) -> str:
    """The array with a group's projected gradients, as numbers or as codes."""
    return f"gradients/{group or '(model)'}"  # the model itself has no name


def scales_name(group: str) -> str:
    """The array with what the rows of a group's codes are multiplied by."""
    return f"scales/{group or '(model)'}"


def part_name(module: str) -> str:
    """The array with one module's part of the scores."""
    return f"parts/{module or '(model)'}"  # the model itself has no name


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a run.

    Attributes:
        shape: Full shape. Rows lie along `row_axis`.
        row_axis: The axis of the N samples; in s_test vectors, the axis of the queries.
        chunk_rows: Rows in a chunk.
        chunk_leading: Entries in a chunk along each axis before `row_axis`. Later axes are not cut.
        dims: A name for every axis.
        attributes: Unit, sign and source of the numbers; stored with the array.
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
    """Rows in a chunk: a power of two that depends on the array only, not on workers or shards.

    It aims at 32 chunks, so that small data sets still spread over workers. A chunk has 256 to
    1,024 rows, more only if there were more than 16,384 chunks else, and fewer if those would
    exceed 4 MiB: each chunk is a file.
    """
    most = max(MAX_CHUNK_ROWS, num_rows // MANY_CHUNKS)
    aim = max(MIN_CHUNK_ROWS, min(most, num_rows // 32))
    fits = max(1, min(aim, MAX_CHUNK_BYTES // max(1, row_bytes)))
    return 1 << (fits.bit_length() - 1)
