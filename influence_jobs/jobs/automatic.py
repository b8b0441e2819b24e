"""The batch size of a run that was submitted without one: one that fits, the fastest if it pays."""

import gc
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from influence_jobs.devices import cores
from influence_jobs.errors import first_line
from influence_jobs.home import Fitting, fitting, keep_fitting
from influence_jobs.jobs.base import Job
from influence_jobs.jobs.estimate import samples_per_second
from influence_jobs.jobs.samples import SampleJob
from influence_jobs.memory import Peak, free_bytes, gpu_share
from influence_jobs.store import layout
from influence_jobs.store.documents import BatchFile

log = logging.getLogger(__name__)

SMALL = 8  # samples of the first batch that is measured: they fit almost everywhere
MEMORY_SHARE = 0.5  # of what is free: a probe sees a few samples, and data are read meanwhile
WORTH_S = 60.0  # work of one worker below which no faster batch is looked for
PROBE_S = 0.5  # for each size
PROBE_SHARE = 0.05  # of a worker's work, as the most that a probe takes beside its first batch
MAX_MULTIPLE = 64  # the largest size that is tried, in multiples of the task's own
MIN_SPEEDUP = 1.1  # another size is taken only if it is this much faster


@dataclass(frozen=True)
class Choice:
    """A batch size that was measured, now or before.

    Attributes:
        rates: Samples a second of one worker, by size, of the small ones roughly; empty if before.
    """

    size: int
    rates: Mapping[int, float] = field(default_factory=dict)

    def said(self, own: int) -> str:
        """Why it is another than the job's own; empty if it is that."""
        if self.size == own:
            return ""
        if not self.rates:
            return f"as an earlier run found on this device, in place of {own:,}"
        if own not in self.rates:
            return f"{own:,} do not fit into memory (probed)"
        gain = self.rates[self.size] / self.rates[own]
        return f"{gain:.2f} times as fast as {own:,} (probed)"


def settle(job: Job[Any], units: int) -> None:
    """Let a job compute in batches of the run's automatic size, which its first worker chooses.

    Args:
        job: Of a run that was submitted without a batch size.
        units: Work of one worker: a part of that in the job's plan.
    """
    known = fitting(_key(job))
    if isinstance(job, SampleJob) and job.reads_samples:
        run = job.run_store
        stored = run.read_json(layout.BATCH, BatchFile)
        if stored is None:
            choice = expected(job, units)
            size = choice.size
            if choice.rates:  # nothing is learned of a probe that failed
                _keep(job, size, out_of_memory=False)
            run.files.create(layout.BATCH, json.dumps({"batch_size": size}).encode())
            stored = run.read_json(layout.BATCH, BatchFile) or {"batch_size": size}
        job.batching.size = stored["batch_size"]
    if known and known["out_of_memory"]:
        job.batching.size = min(job.batching.size, known["batch_size"])


def expected(job: SampleJob[Any], units: int) -> Choice:
    """The size that an earlier run on this device has left, else `chosen`."""
    known = fitting(_key(job))
    if known:
        return Choice(known["batch_size"])
    found = chosen(job, units)
    gc.collect()  # the probe's model, which its own hooks hold
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def keep_halved(job: Job[Any]) -> None:
    """Remember a batch size that was halved within a run, for later runs on this device."""
    _keep(job, job.batching.size, out_of_memory=True)


def chosen(job: SampleJob[Any], units: int) -> Choice:
    """Measure which batch size to take; a run of less than `WORTH_S` keeps its own if that fits.

    Sizes are doubled from `SMALL` samples on, as long as twice what the last one took is free. If
    measuring would take more than `PROBE_SHARE` of its worker's work, its own is kept too: workers
    that start together all measure.

    Args:
        job: It is left as it is, but for the data that it has read.
        units: Work of one worker.
    """
    probe, own = _Probe(job), min(job.batch_size, job.chunk_rows)
    size, rates = min(own, SMALL), probe.rates
    while True:
        if not probe.measure(size, PROBE_S if 2 * size >= own else 0.0):
            return Choice(max(rates, default=own), rates)
        short = units / rates[size] < WORTH_S or probe.dear(size, units)
        if size == own or (short and probe.fits(own / size)):
            break
        if not probe.fits(2):
            return Choice(size, rates)
        size = min(2 * size, own)
    if short:
        return Choice(own, rates)
    most = min(job.chunk_rows, own * MAX_MULTIPLE)
    while 2 * size <= most and probe.fits(2) and not probe.dear(size, units):
        size *= 2
        if not probe.measure(size, PROBE_S) or rates[size] < max(rates.values()):
            break
    timed = {size: rate for size, rate in rates.items() if 2 * size >= own}
    best = max(timed, key=timed.__getitem__)
    return Choice(best if rates[best] > MIN_SPEEDUP * rates[own] else own, rates)


class _Probe:
    """Measures batches of a job, by another job of the same data and a model of its own.

    Attributes:
        rates: Samples a second, by size.
    """

    def __init__(self, job: SampleJob[Any]) -> None:
        self.rates: dict[int, float] = {}
        self._job = job.apart()
        self._pieces: Iterator[float] = self._job.probe()
        self._room = MEMORY_SHARE * free_bytes(job.device)
        self._taken, self._passed = 0, 0.0

    def measure(self, size: int, seconds: float) -> bool:
        """Measure batches of this size for a while; False if there are none, or they fail.

        Of memory or of anything else: the run will meet it and tell it.
        """
        self._job.batching.size = size
        try:
            if not self.rates:  # the model and its checks take memory that batches do not
                next(self._pieces, None)
                self._room = MEMORY_SHARE * free_bytes(self._job.device)
            peak = Peak(self._job.device)
            rate = samples_per_second(self._pieces, seconds)
        except Exception as error:  # noqa: BLE001  (whatever a model raises)
            log.info("batches of %d samples cannot be measured: %s", size, first_line(error))
            return False
        if rate is None:
            return False
        self.rates[size], self._taken = rate, peak.bytes
        self._passed += max(size, rate * seconds)
        return True

    def dear(self, size: int, units: int) -> bool:
        """Whether measuring twice this size as well would take too much beside the work itself."""
        return self._passed + 2 * size > PROBE_SHARE * units

    def fits(self, times: float) -> bool:
        """Whether there is room for so many times what the last size took."""
        return times * self._taken <= self._room


def _key(job: Job[Any]) -> str:
    """Of what the memory of a batch depends on: the model, what is computed of it, the device."""
    task, plan = job.spec.task, job.plan()
    arrays = [
        [a.name, *a.shape[: a.row_axis], *a.shape[a.row_axis + 1 :], a.dtype] for a in plan.arrays
    ]
    return json.dumps(
        [
            job.spec.kind, task.name, dict(task.options), arrays, plan.batch_size,
            getattr(job.spec, "precision", ""), getattr(job.spec, "sample_precision", None),
            _device(job.device),
        ]
    )  # fmt: skip


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return f"cpu, {torch.get_num_threads()} of {cores()} threads"
    found = torch.cuda.get_device_properties(device)
    part = f", {gpu_share():g} of them" if gpu_share() < 1 else ""
    return f"{found.name}, {found.total_memory} bytes{part}"


def _keep(job: Job[Any], size: int, *, out_of_memory: bool) -> None:
    found: Fitting = {"batch_size": size, "out_of_memory": out_of_memory}
    keep_fitting(_key(job), found)
