"""How a worker does a shard: compute it, write it, then record it in the manifest."""

import contextlib
import errno
import logging
import math
import os
import socket
import time
import traceback
from typing import Literal

import torch

from influence_jobs.errors import (
    DISK_ERRORS,
    InflError,
    ModelError,
    SpecError,
    StoreError,
    first_line,
)
from influence_jobs.gpu import tf32
from influence_jobs.jobs.automatic import keep_halved, settle
from influence_jobs.jobs.base import Receipt, Shard
from influence_jobs.kinds import kind_of, open_job
from influence_jobs.kinds.same_data import require_same_here
from influence_jobs.memory import is_out_of_memory
from influence_jobs.store import layout
from influence_jobs.store.documents import Entry
from influence_jobs.store.object_files import be_patient, is_of_store
from influence_jobs.store.run import Run, now
from influence_jobs.store.software import software
from influence_jobs.tasks.fingerprints import require_unchanged
from influence_jobs.tasks.own_code import place_and_cure

log = logging.getLogger(__name__)

PROGRESS_EVERY_S = 1.0
PROGRESS_FILES_A_S = 64  # of all workers together: each file is a request to a shared store
# Errors that every shard would meet.
FATAL = (ModelError, SpecError, StoreError)


def progress_every_s(workers: int) -> float:
    """How often a worker among so many tells its progress."""
    return max(PROGRESS_EVERY_S, workers / PROGRESS_FILES_A_S)


def this_process() -> str:
    """This process, as HOST:PID."""
    return f"{socket.gethostname()}:{os.getpid()}"


class ShardRunner:
    """Does shards of one run, one after the other.

    Args:
        root: Folder of all runs.
        run_id: The run.
        device: A torch device.
        threads: Number of threads that torch may use for one operation.
        workers: Workers of the run. The more there are, the less each spends on a search for a
            batch size, and the less often it writes its progress.
        compared: Whether this process has already compared the data with the run's.

    Raises:
        SpecError: The training data or the task's code have changed since the run was made.
        DataError: The data are not those that the run was begun with.
    """

    def __init__(
        self,
        root: str,
        run_id: str,
        *,
        device: str = "cpu",
        threads: int | None = None,
        workers: int = 1,
        compared: bool = False,
    ):
        if threads:
            torch.set_num_threads(threads)
        be_patient()
        self._progress_every_s = progress_every_s(workers)
        self._run = Run.open(root, run_id)
        plan = self._run.plan()
        batch_size = plan["batch_size"] if plan else None
        self._job = open_job(self._run, device=device, batch_size=batch_size)
        self._tf32 = self._job.tf32
        self.kind = self._run.spec.kind
        self.title = self._job.title
        software()  # read it now: files may change later, but the loaded code does not
        if self._job.reads_data:
            require_unchanged(self._run.id, self._run.spec.task, self._job.task)
            if not compared:
                require_same_here(self._job)
        if plan and plan.get("automatic_batch") and kind_of(self._run.spec).batched:
            with tf32(self._tf32):
                settle(self._job, math.ceil(plan["units"] / workers))

    def run(self, shard: Shard) -> Receipt:
        """Do one shard, unless the manifest says it is done. Errors come back in the receipt."""
        started = time.monotonic()
        attempt = 1
        try:
            entry = self._run.manifest.read(shard.id)
            if entry is not None and entry.state == "done":
                return Receipt(shard.id, "done", attempt=entry.attempt, worker=entry.worker)
            attempt = entry.attempt + 1 if entry else 1
            with tf32(self._tf32):
                units = self._do(shard, attempt, started)
        except Exception as raised:  # a worker must survive a bad shard
            error = _gpu_failure(raised, self._job.device) or raised
            kind = _kind(error)
            if not isinstance(error, (InflError, OSError)):
                log.exception("shard %s", shard.id)
                self._keep_traceback(shard)
            seconds = time.monotonic() - started
            return Receipt(shard.id, "failed", _line(error), kind, attempt, seconds)
        return Receipt(
            shard.id,
            "done",
            attempt=attempt,
            seconds=time.monotonic() - started,
            units=units,
            worker=this_process(),
        )

    def _do(self, shard: Shard, attempt: int, started: float) -> int:
        run, spec_hash = self._run, self._run.spec.hash
        running = Entry(shard.id, shard.start, shard.stop, attempt, spec_hash)
        run.manifest.write(running)
        progress = _Progress(run, shard, self._progress_every_s)
        before = self._job.used_batch_size
        result = self._job.run(shard, progress)
        latest = run.manifest.read(shard.id)
        if latest is not None and latest.state == "done":
            return progress.units  # another worker was at it too and has finished: nothing to add
        used = self._job.used_batch_size
        if used and used < (before or self._job.batch_size):
            keep_halved(self._job)
        sums = {
            name: run.write_rows(name, shard.start, values)
            for name, values in result.arrays.items()
        }
        files = dict(result.files)
        for name, table in result.tables.items():
            files |= run.write_table(name, table)
        done = Entry(
            **{
                **running.__dict__,
                "state": "done",
                "arrays": sums,
                "files": files,
                "seconds": time.monotonic() - started,
                "worker": this_process(),
                "software": software(),
                "finished_at": now(),
                "threads": torch.get_num_threads(),
                "batch_size": used,
            }
        )
        run.manifest.write(done)
        progress.end()
        return progress.units

    def _keep_traceback(self, shard: Shard) -> None:
        """Write the traceback into the run folder, because the cluster's logs may be lost."""
        name = f"{layout.LOGS}/shard-{shard.id}.log"
        with contextlib.suppress(OSError, StoreError):  # the receipt has the error in any case
            self._run.files.write(name, traceback.format_exc().encode())


class _Progress:
    """Writes the progress of a shard from time to time."""

    def __init__(self, run: Run, shard: Shard, every_s: float):
        self._run, self._every_s = run, every_s
        self._name = f"{layout.PROGRESS}/{shard.id}.json"
        self._resumed: int | None = None
        self._done = 0
        self._written = False
        self._last = time.monotonic()

    def __call__(self, done: int) -> None:
        first = self._resumed is None
        if self._resumed is None:
            self._resumed = done
        self._done = done
        if (first and done) or time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            self._run.write_json(self._name, {"units": done, "resumed": self._resumed})
            self._written = True

    def end(self) -> None:
        """Remove what was written: the shard is done."""
        if self._written:
            self._run.files.delete(self._name)

    @property
    def units(self) -> int:
        """Units done by this attempt."""
        return self._done - (self._resumed or 0)


def _kind(error: Exception) -> Literal["user", "transient", "worker", "fatal"]:
    if isinstance(error, FATAL):
        return "fatal"
    if _is_gpu_failure(error):
        return "worker"
    if isinstance(error, OSError):
        return "fatal" if error.errno in DISK_ERRORS else "transient"
    # Errors of an object store pass through Zarr; they are not OSErrors.
    return "transient" if is_of_store(error) else "user"


def _gpu_failure(error: Exception, device: torch.device) -> Exception | None:
    """What a GPU says that has failed for good, whatever else was raised because of it."""
    if device.type != "cuda" or is_out_of_memory(error) or _is_gpu_failure(error):
        return None
    try:
        torch.cuda.synchronize(device)  # it says so every time from then on
    except RuntimeError as failure:
        return failure
    return None


def _is_gpu_failure(error: Exception) -> bool:
    """Whether a GPU failed so that this process cannot use it again."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )


def _line(error: Exception) -> str:
    if isinstance(error, InflError):
        return str(error)
    if is_out_of_memory(error):
        return (
            "out of memory: choose a smaller --batch-size, fewer layers (--layer), fewer queries, "
            "or a machine or GPU with more memory"
        )
    if _is_gpu_failure(error):
        said = f"the GPU failed ({first_line(error)})"
        if "device-side assert" in str(error):  # on a CPU it is an error of its own, with a name
            return (
                f"{said}, as it does where a label, a token or an index is out of range: try the "
                "samples with --device cpu, or resume the run"
            )
        return f"{said}: resume the run"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full: make room and resume"
    return f"{type(error).__name__}: {first_line(error)}{place_and_cure(error)}"
