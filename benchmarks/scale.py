"""What a run over 100 million samples of a model of 100 million parameters costs besides computing.

Counted, from the plans of jobs: chunks (each a file), bytes, shards. Measured, on a folder of this
machine with a manifest of many entries: what a shard costs its worker and the driver, what it takes
to plan, resume and look at such a run, and a look at the progress of 512 workers. The worker's part
is waiting for the disk; in an object store each file is a request.

    python benchmarks/scale.py [--entries 100000]
"""

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
import typer
from harness import header, print_table
from load import spec_of

from infl_cluster.dispatch import Dispatch
from infl_cluster.plans import new_plan
from infl_cluster.retry import RetryPolicy
from infl_cluster.run_log import run_log
from infl_cluster.status import StatusWriter
from infl_cluster.stragglers import Pace
from influence_jobs.jobs.base import Plan, Progress, Receipt, Result, Shard
from influence_jobs.jobs.samples import SampleJob, row_bytes
from influence_jobs.jobs.scores import scores_layout
from influence_jobs.specs.base import AnySpec
from influence_jobs.store import layout
from influence_jobs.store.documents import Entry
from influence_jobs.store.layout import ArrayLayout, chunk_rows
from influence_jobs.store.run import BLOCK_ROWS, Run, now
from influence_jobs.store.software import software
from influence_jobs.store.status import is_done
from influence_jobs.terms import size

SAMPLES, PARAMETERS, WORKERS = 100_000_000, 100_000_000, 512
LAYERS, QUERIES, NUMBERS = 50, 100, 4096


class PlanOnly(SampleJob[Any]):
    """Plans arrays of so many samples; it has no model and no data."""

    title = "plan"
    passes = 1
    checkpoints = ()
    batch_size = 1
    num_rows = SAMPLES

    def __init__(self, arrays: tuple[ArrayLayout, ...]) -> None:
        self._arrays = arrays

    @staticmethod
    def inputs(spec: Any) -> tuple[AnySpec, ...]:
        return ()

    def layouts(self) -> tuple[ArrayLayout, ...]:
        return self._arrays

    def run(self, shard: Shard, progress: Progress) -> Result:
        return Result()

    def probe(self) -> Iterator[float]:
        yield 0.0


def rows_of(name: str, numbers: int) -> ArrayLayout:
    rows = chunk_rows(SAMPLES, 4 * numbers)
    return ArrayLayout(name, (SAMPLES, numbers), 0, rows, ("sample", "number"))


JOBS = {
    f"norms, a number for each of {LAYERS} layers": tuple(
        rows_of(f"norms/{i}", 1) for i in range(LAYERS)
    ),
    f"scores of {QUERIES} queries": (
        scores_layout("scores", QUERIES, SAMPLES, dtype="float32", attributes={}),
    ),
    f"projected gradients, {NUMBERS:,} numbers": (rows_of("gradients", NUMBERS),),
}


def chunks_of(array: ArrayLayout) -> int:
    return math.prod(math.ceil(n / c) for n, c in zip(array.shape, array.chunks, strict=True))


def print_counts() -> None:
    rows = []
    for name, arrays in JOBS.items():
        plan = new_plan(PlanOnly(arrays), None, WORKERS)
        shard = plan.shards[0]
        rows.append(
            [
                name,
                size(SAMPLES * row_bytes(arrays)),
                f"{sum(map(chunks_of, arrays)):,}",
                f"{arrays[0].chunk_rows:,}",
                f"{len(plan.shards):,}",
                f"{shard.stop - shard.start:,}",
                size(plan.largest_shard_bytes),
            ]
        )
    columns = ["", "bytes", "chunks", "rows of a chunk", "shards", "rows of a shard", "its memory"]
    print_table(columns, rows)


def timed(act: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


class AtOnce:
    """Workers that have done a shard as soon as they get it."""

    def __init__(self) -> None:
        self.idle: list[Hashable] = []
        self._given: deque[tuple[Hashable, Shard]] = deque()

    def now(self) -> float:
        return time.monotonic()

    def grow(self, size: int) -> None:
        self.idle += range(len(self.idle) + len(self._given), size)

    def give(self, worker: Hashable, shard: Shard) -> str:
        self.idle.remove(worker)
        self._given.append((worker, shard))
        return f"host:{worker}"

    def wait(self, timeout_s: float) -> tuple[Hashable, Receipt]:
        worker, shard = self._given.popleft()
        self.idle.append(worker)
        return worker, Receipt(shard.id, "done", seconds=1.0, units=1)

    def end(self, worker: Hashable) -> None:
        raise AssertionError("nobody is late")


def dispatched(run: Run, plan: Plan) -> None:
    """What the driver does for each shard, besides Ray's part."""
    log = logging.getLogger("infl_cluster.driver")
    with run_log(run), StatusWriter(run) as status:
        status.planned(plan, {})

        def received(receipt: Receipt, again: bool) -> None:
            status.count(receipt, retried=again)
            log.info("shard %s done in %.2f s, attempt %d", receipt.shard, receipt.seconds, 1)

        Dispatch(
            AtOnce(),
            plan.shards,
            most=WORKERS,
            policy=RetryPolicy(),
            pace=Pace(),
            stalled_after_s=math.inf,
            on_start=status.started,
            on_leave=status.left,
            on_receipt=received,
            on_rescue=lambda *_: None,
            on_idle=lambda: None,
            quiet_s=lambda _: 0.0,
        ).run()


def entry_of(run: Run, shard: Shard, state: Any, arrays: int = 1) -> Entry:
    """An entry of the usual size."""
    digest = hashlib.sha256(shard.id.encode()).hexdigest()
    sums = {f"norms/{i}": digest for i in range(arrays)} if state == "done" else {}
    return Entry(
        shard.id,
        shard.start,
        shard.stop,
        attempt=1,
        spec=run.spec.hash,
        state=state,
        arrays=sums,
        seconds=1.0,
        worker="host:1",
        software=software(),
        finished_at=now(),
    )


def many_entries(folder: Path, count: int) -> None:
    run = Run.create(str(folder), spec_of(count))
    step = SAMPLES // count
    shards = tuple(
        Shard(f"{start:09d}-{start + step:09d}", start, start + step)
        for start in range(0, count * step, step)
    )
    plan = Plan((), shards, units=count, batch_size=1)
    document = {
        "batch_size": 1, "units": count, "shards": [asdict(s) for s in shards], "inputs": {},
    }  # fmt: skip
    written = timed(lambda: run.write_json(layout.PLAN, document))
    read = timed(run.plan)
    plan_bytes = Path(run.files.url, layout.PLAN).stat().st_size
    synced = shards[: min(500, count)]

    def as_a_worker() -> None:
        for shard in synced:
            run.manifest.read(shard.id)
            run.manifest.write(entry_of(run, shard, "running"))
            run.manifest.read(shard.id)
            run.manifest.write(entry_of(run, shard, "done"))

    for_worker = timed(as_a_worker) / len(synced)
    for shard in shards[len(synced) :]:  # without waiting for the disk
        data = asdict(entry_of(run, shard, "done"))
        del data["checksum"]
        run.files.write(
            f"{layout.MANIFEST}/{shard.id}.json",
            json.dumps(data).encode(),
            durable=False,
        )
    for_driver = timed(lambda: dispatched(run, plan)) / count
    resumed = timed(run.manifest.done)
    run.manifest.write(entry_of(run, Shard(layout.FINISH, 0, 0), "done"))
    summed = timed(run.manifest.write_summary)
    again = Run.open(run.root, run.id)
    looked = timed(lambda: is_done(again))
    rows = [
        ["a worker's entries: 2 written, 1 synced, 2 read", f"{1e3 * for_worker:.2f} ms a shard"],
        ["the driver's part without Ray's", f"{1e3 * for_driver:.3f} ms a shard"],
        ["plan written, and read", f"{written:.2f} s, {read:.2f} s ({size(plan_bytes)})"],
        ["manifest read by a driver that resumes", f"{resumed:.1f} s"],
        ["summary written at the end", f"{summed:.1f} s"],
        ["is it done?", f"{looked:.2f} s"],
        [f"status with the progress of {WORKERS} workers", f"{1e3 * beat_s(run, plan):.0f} ms"],
    ]
    rows.append([f"table of {SAMPLES // 10:,} samples", samples_table(run)])
    print_table([f"measured with {count:,} shards", ""], rows)


def samples_table(run: Run) -> str:
    """What the driver takes at the end for the table that describes each sample."""

    def block(start: int) -> pa.Table:
        ids = np.arange(start, min(start + BLOCK_ROWS, SAMPLES // 10))
        return pa.table({"sample": ids, "label": ids % 1000})

    starts = range(0, SAMPLES // 10, BLOCK_ROWS)
    seconds = timed(lambda: run.write_table_in_blocks("samples", map(block, starts)))
    written = Path(run.files.url, layout.TABLES, "samples.parquet").stat().st_size
    most = pa.default_memory_pool().max_memory()
    return f"{seconds:.1f} s, {size(written)}, {size(most)} of memory, however many there are"


def beat_s(run: Run, plan: Plan) -> float:
    """Seconds of writing the status when every worker has reported progress."""
    for shard in plan.shards[:WORKERS]:
        name = f"{layout.PROGRESS}/{shard.id}.json"
        run.files.write(name, b'{"units": 1, "resumed": 0}', durable=False)
    with StatusWriter(run) as status:
        status.planned(plan, {})
        return min(timed(status._write) for _ in range(5))


def main(
    entries: Annotated[int, typer.Option(help="Shards of the manifest.")] = 100_000,
    folder: Annotated[Path | None, typer.Option(help="Where to write it.")] = None,
) -> None:
    """Print counts, and what each of them costs."""
    torch.set_num_threads(1)
    header(f"{SAMPLES:,} samples of a model of {PARAMETERS:,} parameters, {WORKERS} workers")
    vector = 4 * PARAMETERS
    print(
        f"- an s_test vector has {size(vector)}, those of {QUERIES} queries {size(100 * vector)}\n"
    )
    print_counts()
    print()
    with tempfile.TemporaryDirectory(dir=folder or os.environ.get("TMPDIR")) as place:
        many_entries(Path(place), entries)


if __name__ == "__main__":
    typer.run(main)
