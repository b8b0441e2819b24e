"""Prometheus metrics of a run. Ray exports them as `ray_infl_...` at the metrics port of each node.

Counters and the memory of GPUs are of one worker, named HOST:PID as in `infl logs`. They start at
zero in a new one: use rate(), and sum over workers. Progress is of the run as a whole: the driver
passes on what its status says, as `infl status` and the viewer show it. The same request has the
same run id in each folder of runs, so `folder` tells them apart.
"""

from collections.abc import Mapping
from typing import Any

import torch
from ray.util.metrics import Counter, Gauge

from influence_jobs.jobs.base import Receipt
from influence_jobs.store.status import rate_and_eta

_TAGS = ("run", "kind", "folder")
# A field of a status; the metric that shows it, and what it is.
_OF_STATUS = {
    "shards_done": ("infl_run_shards_done", "Shards done, by earlier drivers too."),
    "shards_total": ("infl_run_shards", "Shards of the run."),
    "units_done": ("infl_run_samples_done", "Samples done, in unfinished shards too."),
    "units_total": ("infl_run_samples", "Samples of the run."),
    "rate": ("infl_run_samples_per_second", "Rate, lately."),
    "eta": ("infl_run_eta_seconds", "Seconds left at that rate."),
    "retries": ("infl_run_retries", "Shards tried again by this driver."),
    "backups": ("infl_backup_shards", "Slow shards given to a second worker by this driver."),
    "backups_won": ("infl_backup_shards_won", "Those of them that the second one finished first."),
    "stalled": ("infl_stalled_workers", "Hanging workers replaced by this driver."),
}


class WorkerMetrics:
    """Counts what a worker does for a run.

    Args:
        run: Run id.
        kind: Kind of the job, e.g. `grad-norms`.
        folder: Folder of all runs.
        worker: Its process, as HOST:PID.
    """

    def __init__(self, run: str, kind: str, folder: str, worker: str) -> None:
        tags = (*_TAGS, "worker")
        self._samples = Counter("infl_samples", "Samples computed.", tags)
        self._done = Counter("infl_shards_done", "Shards finished.", tags)
        self._rate = Gauge("infl_samples_per_second", "Rate within the last shard.", tags)
        self._memory = Gauge(
            "infl_gpu_memory_bytes", "Most GPU memory that torch has reserved; 0 on CPUs.", tags
        )
        for metric in (self._samples, self._done, self._rate, self._memory):
            metric.set_default_tags({"run": run, "kind": kind, "folder": folder, "worker": worker})

    def finished(self, receipt: Receipt) -> None:
        """Count a shard that is done."""
        self._done.inc()
        if receipt.units > 0:
            self._samples.inc(receipt.units)
        if receipt.seconds > 0:
            self._rate.set(receipt.units / receipt.seconds)
        on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._memory.set(torch.cuda.max_memory_reserved() if on_gpu else 0)


class RunMetrics:
    """Passes on the progress of a run, from its driver.

    Args:
        run: Run id.
        kind: Kind of the job.
        folder: Folder of all runs.
    """

    def __init__(self, run: str, kind: str, folder: str) -> None:
        self._gauges = {
            field: Gauge(name, said, _TAGS) for field, (name, said) in _OF_STATUS.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run, "kind": kind, "folder": folder})

    def show(self, status: Mapping[str, Any]) -> None:
        """Pass on what a run's status says."""
        found = {**status}
        if speed := rate_and_eta(found):
            found["rate"], found["eta"] = speed
        for field, gauge in self._gauges.items():
            if found.get(field) is not None:
                gauge.set(found[field])
