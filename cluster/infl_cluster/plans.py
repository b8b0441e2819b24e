"""The plan of a run: the first driver settles it, and it never changes."""

import math
from dataclasses import asdict, fields
from typing import Any

from influence_jobs.errors import StoreError
from influence_jobs.jobs.base import Job, Plan, Shard
from influence_jobs.jobs.samples import SampleJob
from influence_jobs.kinds.same_data import require_same_data, sample_digests
from influence_jobs.store import layout

SHARDS_A_WORKER = 16  # about, as far as there are chunks


def new_plan(job: Job[Any], shard_rows: int | None, workers: int) -> Plan:
    """The plan of a run without one: of samples, many workers get more shards than few.

    A worker that is at the last shard while all others are done costs the less the shorter it is.
    """
    plan = job.plan(shard_rows)
    wanted = workers * SHARDS_A_WORKER
    if shard_rows is not None or not isinstance(job, SampleJob) or len(plan.shards) >= wanted:
        return plan
    return job.plan(math.ceil(plan.shards[-1].stop / wanted))


def settled_plan(job: Job[Any], shard_rows: int | None, workers: int, *, automatic: bool) -> Plan:
    """The stored plan of the first driver, or a new one: shards must stay the same.

    Raises:
        StoreError: It was settled by a version that cut other shards, or for other inputs.
        DataError: The data are not those that the run was begun with.
    """
    run = job.run_store
    stored = run.plan()
    digests = job.input_digests()
    if stored is None:
        plan = new_plan(job, shard_rows, workers)
        samples = {"samples": sample_digests(job)} if job.reads_data else {}
        run.manifest.keep_only({*(shard.id for shard in plan.shards), layout.FINISH})
        run.write_json(
            layout.PLAN,
            {
                "batch_size": plan.batch_size,
                "units": plan.units,
                "shards": [asdict(shard) for shard in plan.shards],
                "inputs": digests,
                "shapes": {array.name: list(array.shape) for array in plan.arrays},
                "chunks": {array.name: list(array.chunks) for array in plan.arrays},
                "automatic_batch": automatic,
                **samples,
            },
        )
        return plan
    if changed := [
        name for name, digest in digests.items() if stored["inputs"].get(name) != digest
    ]:
        raise StoreError(
            f"run {run.id} has shards computed from an earlier {changed[0]}, which has been "
            "computed again since: delete the run's folder and submit it again"
        )
    if job.reads_data:
        require_same_data([run], run.spec.task, job.task)
    known = {field.name for field in fields(Shard)}
    if later := sorted({name for shard in stored["shards"] for name in shard} - known):
        raise StoreError(
            f"run {run.id}: its {layout.PLAN} is of a later version (shards have {later[0]}): "
            "resume it with that version"
        )
    shards = tuple(Shard(**shard) for shard in stored["shards"])
    arrays = job.plan().arrays
    if "chunks" not in stored and any(a.chunk_rows > layout.MAX_CHUNK_ROWS for a in arrays):
        raise StoreError(
            f"run {run.id} was begun by an earlier version, in smaller chunks: resume it with that "
            "version, or delete the run's folder and submit it again"
        )
    return Plan(arrays, shards, stored["units"], stored["batch_size"])
