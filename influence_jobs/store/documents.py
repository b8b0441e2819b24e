"""The small JSON files of a run folder, and the only way to read them.

A folder may be damaged, or come from a stranger. So a reader gets a document of the right type, or
a `StoreError` that names the file and the cure. Fields of later versions are let through.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from influence_jobs.errors import StoreError
from influence_jobs.specs.base import first_error

Rate = Annotated[float, Field(gt=1e-12, lt=2**63)]
Time = Annotated[float, Field(ge=0, lt=2.5e11)]  # seconds since 1970, before the year 9892
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
# Of a run, shard or owner: it is part of a file's name.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=200)]
SampleId = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]
MOST_BYTES = 2**26  # of a document: a plan of half a million shards
_LAX = ConfigDict(extra="allow", strict=True)


def _inside(name: str) -> str:
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts:
        raise ValueError("it leads out of the run's folder")
    return name


@with_config(_LAX)
class NodeShare(TypedDict):
    """How many shards a host has done, and how many of its workers have one now."""

    shards: Count
    at_work: Count


@with_config(_LAX)
class Status(TypedDict):
    """status.json: the state of the driver. Units are samples that went through a model.

    `oom_kills` is how many processes the driver's machine had killed for lack of memory. Of slow
    shards, `backups` were given to a second worker, which finished first in `backups_won`;
    `stalled` counts workers that were ended because their shard made no progress, and
    `computed_again` shards of which two workers had written different bytes. `needs` are the runs
    that are carried out first, in this order. `nodes` are the hosts by name. `rate` is in units a
    second, lately; earlier versions have `work_started_at` in its place. A run that is submitted
    again is `new` until its driver begins.
    """

    state: Literal["new", "running", "done", "stopped", "failed"]
    phase: Name | None
    message: str | None
    started_at: Time
    updated_at: Time
    work_started_at: NotRequired[Time]
    rate: NotRequired[Rate]
    shards_done: Count
    shards_total: Count | None
    units_before: Count
    units_done: Count
    units_total: Count | None
    retries: Count
    backups: NotRequired[Count]
    backups_won: NotRequired[Count]
    stalled: NotRequired[Count]
    computed_again: NotRequired[Count]
    failures: dict[str, str]
    oom_kills: NotRequired[Count | None]
    needs: NotRequired[list[Name]]
    nodes: NotRequired[dict[str, NodeShare]]


@with_config(_LAX)
class PlannedShard(TypedDict):
    """A shard, as `jobs.base.Shard` has it."""

    id: Name
    start: Count
    stop: Count
    part: NotRequired[Count]
    parts: NotRequired[Count]


@with_config(_LAX)
class SampleDigests(TypedDict):
    """Digests of some training samples, and of the queries' test samples, by their ids."""

    training: dict[SampleId, str]
    test: dict[SampleId, str]


@with_config(_LAX)
class PlanFile(TypedDict):
    """plan.json: what the first driver settled.

    `inputs` has the digests of the runs that this one was computed from. Runs older than the field
    have no `shapes` or `chunks` of arrays. `automatic_batch`: no batch size was asked for.
    `samples`: by which workers and later drivers see whether their data are the same; not in runs
    older than the field, nor in those that read other runs only.
    """

    batch_size: Annotated[int, Field(ge=1)]
    units: Count
    shards: list[PlannedShard]
    inputs: dict[str, str]
    shapes: NotRequired[dict[str, list[Count]]]
    chunks: NotRequired[dict[str, list[Count]]]
    automatic_batch: NotRequired[bool]
    samples: NotRequired[SampleDigests]


@with_config(_LAX)
class Holder(TypedDict):
    """lease.json: the driver that may write, and its last heartbeat."""

    owner: Name
    host: str
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    process_started: float
    beat: Time


@with_config(_LAX)
class Asked(TypedDict, total=False):
    """What was asked of a run's workers, for the command that goes on with it."""

    workers: Count
    device: Literal["auto", "cpu", "cuda"]
    num_gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    node_label: list[str]
    stalled_after: Seconds


@with_config(_LAX)
class JobFile(TypedDict):
    """job.json: the Ray job that runs the driver; without an address on the Ray of this machine."""

    address: Annotated[str, Field(pattern=r"^https?://")] | None
    submission_id: Name
    asked: NotRequired[Asked]


@with_config(_LAX)
class ProgressFile(TypedDict):
    """progress/ID.json: units of a shard under way, and of them those of earlier attempts."""

    units: Count
    resumed: NotRequired[Count]


@with_config(_LAX)
class BatchFile(TypedDict):
    """batch.json: the batch size that the first worker has chosen, if none was asked for."""

    batch_size: Annotated[int, Field(ge=1)]


@with_config(_LAX)
class Width(TypedDict):
    """width.json: how many variants a retraining run trains side by side."""

    variants_side_by_side: Annotated[int, Field(ge=1)]


@with_config(ConfigDict(extra="ignore"))
@dataclass(frozen=True)
class Entry:
    """manifest/ID.json: a shard's record.

    Attributes:
        start: First row.
        stop: Row after the last one.
        attempt: How often the shard was started, including this time.
        spec: Hash of the spec that it was computed for.
        arrays: SHA-256 of the rows written, by array.
        files: SHA-256 of the files written, by name.
        seconds: Time taken, including the writing.
        worker: Host and process that computed it.
        software: Versions and revision that computed it; empty in runs older than this field.
        threads: Of one torch operation, on which rounding depends; 0 in runs older than this field.
        batch_size: Of its last batch; 0 if it has none, or in runs older than this field.
        checksum: SHA-256 of the other fields; empty in runs older than this field.
    """

    shard: Name
    start: Count
    stop: Count
    attempt: Count
    spec: str
    state: Literal["running", "done"] = "running"
    arrays: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[Annotated[str, AfterValidator(_inside)], str] = field(default_factory=dict)
    seconds: Seconds = 0.0
    worker: str = ""
    software: Mapping[str, Any] = field(default_factory=dict)
    finished_at: Time | None = None
    threads: Count = 0
    batch_size: Count = 0
    checksum: str = ""


@with_config(_LAX)
class Used(TypedDict):
    """The software that computed some entries of a manifest."""

    software: dict[str, Any]
    entries: Count


@with_config(_LAX)
class Summary(TypedDict):
    """summary.json: what the entries of a finished run's manifest say together.

    Attributes:
        entries: Number of entries; in the file, all are done.
        shards: The same without the one of what follows all shards.
        finish: SHA-256 of the entry that was written last, the one of what follows all shards.
        digest: `Run.digest`.
        retries: Number of repeated attempts.
        seconds: Time in shards, summed over workers.
        workers: Number of processes that computed shards.
        ended: When the last entry was finished; None if that was not recorded.
        used: The software, the most used first.
        batch_sizes: Of the shards that had batches; not in summaries older than the field.
        checksum: SHA-256 of the other fields; in the file only.
    """

    entries: Count
    shards: Count
    finish: str
    digest: str
    retries: Count
    seconds: Seconds
    workers: Count
    ended: Time | None
    used: list[Used]
    batch_sizes: NotRequired[list[Count]]
    checksum: NotRequired[str]


D = TypeVar("D")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parsed(data: bytes, kind: type[D], where: str, *, cure: str = "delete it") -> D:
    """A document of some type.

    Args:
        where: The file, for the message.
        cure: What to do about a damaged one.

    Raises:
        StoreError: It is no JSON, or of another type.
    """
    try:
        found: D = _adapter(kind).validate_json(data)  # type: ignore[arg-type]
    except ValidationError as error:
        raise StoreError(f"{where} is damaged ({first_error(error)}): {cure}") from error
    return found
