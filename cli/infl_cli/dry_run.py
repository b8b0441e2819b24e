"""`--dry-run`: disk, memory and time of a run, estimated from its plan and a short probe."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track

from infl_cli import render
from infl_cluster.client import remote_client
from infl_cluster.how import How, room_on
from infl_cluster.plans import new_plan
from influence_jobs.devices import cores, threads
from influence_jobs.errors import RuntimeFault
from influence_jobs.gpu import tf32
from influence_jobs.jobs.automatic import expected
from influence_jobs.jobs.base import Plan
from influence_jobs.jobs.estimate import samples_per_second, worker_bytes
from influence_jobs.jobs.samples import SampleJob
from influence_jobs.kinds import missing_inputs, open_job
from influence_jobs.memory import Peak
from influence_jobs.store.run import Run
from influence_jobs.terms import duration, size, speed

PROBE_S = 2.0
CLUSTER_S = 10.0  # for the answer of a cluster
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Estimate:
    """Cost of one run, without the runs that it needs first.

    Attributes:
        run: Its id.
        batch_size: Samples that go through the model at once.
        rate: Samples a second of all workers together; None if that cannot be measured.
        memory: Bytes of one worker, at most.
        why: Why the batch has another size than the task's own.
        notes: What a user may want to know, a line each.
    """

    run: str
    plan: Plan
    batch_size: int
    workers: int
    rate: float | None
    memory: int
    why: str = ""
    notes: Sequence[str] = ()

    @property
    def seconds(self) -> float | None:
        """Time that the run takes, if known."""
        return None if self.rate is None else self.plan.units / self.rate


def print_plan(run: Run, how: How, *, json: bool) -> None:
    """Print the plan of a run and the cost of it and of the runs it needs. Writes nothing."""
    workers, assumed = _workers(how)
    *before, own = [
        _estimate(one, how, workers)
        for one in track(
            [*missing_inputs(run), run],
            "probing",
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
    ]
    needs = {one.run: one for one in before}
    plan = own.plan
    disk = plan.disk_bytes
    parts = [one.seconds for one in (own, *needs.values())]
    total = None if None in parts else sum(part for part in parts if part is not None)
    summary = {
        "run": run.id,
        "path": run.files.url,
        "needs_first": [
            {
                "run": name,
                "samples": n.plan.units,
                "estimated_seconds": n.seconds,
                "notes": [*n.notes],
            }
            for name, n in needs.items()
        ],
        "shards": len(plan.shards),
        "rows_per_shard": max((shard.stop - shard.start for shard in plan.shards), default=0),
        "samples": plan.units,
        "batch_size": own.batch_size,
        "batch_size_because": own.why,
        "workers": own.workers,
        "workers_because": assumed,
        "disk_bytes": disk,
        "memory_bytes_per_worker": own.memory,
        "samples_per_second": own.rate,
        "estimated_seconds": own.seconds,
        "total_seconds": total,
        "notes": list(own.notes),
    }
    if json:
        render.print_json(summary)
        return
    rows = [("run", run.id), ("path", run.files.url)]
    rows += [("done first", f"{name}, {_time(n)}") for name, n in needs.items()] or [
        ("done first", "nothing")
    ]
    rows += [("", line) for needed in needs.values() for line in needed.notes]
    rows += [
        ("shards", f"{summary['shards']} of up to {summary['rows_per_shard']:,} rows"),
        (
            "samples",
            f"{plan.units:,}" + (f" in batches of {own.batch_size:,}" if own.rate else ""),
        ),
        *([("batches", f"of {own.batch_size:,}: {own.why}")] if own.why else []),
        ("workers", f"{own.workers} on {how.resolved_device}"),
        *([("", assumed)] if assumed else []),
        ("disk", f"{size(disk)} before compression"),
        ("memory", f"at most about {size(own.memory)} a worker, however many samples there are"),
        ("time", _time(own) + (" (probed)" if own.rate else "")),
        *(("note", note) for note in own.notes),
    ]
    if needs:
        rows.append(("total", "unknown" if total is None else f"about {duration(total)}"))
    render.print_fields(rows)


def _time(estimate: Estimate) -> str:
    if not estimate.plan.shards:
        return "nothing of its own"
    if estimate.rate is None or estimate.seconds is None:
        return "unknown: the task's own train() takes it"
    return f"about {duration(estimate.seconds)} at {speed(estimate.rate)}"


def _workers(how: How) -> tuple[int, str]:
    """The workers that a run would have, and why so many are assumed, if they are."""
    if not how.address or how.workers:
        return how.workers or how.num_workers, ""
    try:
        nodes = remote_client(how.address, timeout_s=CLUSTER_S).nodes()
    except RuntimeFault as fault:
        return 1, f"one is assumed, give their number with --workers: {fault}"
    labels = dict(label.split("=", 1) for label in how.node_label)
    rooms = [
        node.get("resources_total") or {}
        for node in nodes
        if labels.items() <= (node.get("labels") or {}).items()
    ]
    return room_on(rooms, how.gpus_of_a_worker(rooms)), f"as many as {how.address} has room for now"


def _estimate(run: Run, how: How, workers: int) -> Estimate:
    job = open_job(run, device=how.resolved_device, batch_size=how.batch_size)
    plan = new_plan(job, how.shard_size, workers)
    if not plan.shards:  # all its work is done by the runs it needs
        return Estimate(run.id, plan, plan.batch_size, workers=1, rate=1.0, memory=Peak(CPU).most)
    workers = min(workers, len(plan.shards))
    torch.set_num_threads(threads() if how.local else max(1, cores() // workers))
    size, why = plan.batch_size, ""
    if isinstance(job, SampleJob):
        size = min(size, job.chunk_rows)  # batches never cross chunks
        if how.batch_size is None and job.reads_samples:
            with tf32(job.tf32):
                choice = expected(job, math.ceil(plan.units / workers))
            size, why = choice.size, choice.said(size)
        job = open_job(run, device=how.resolved_device, batch_size=size)
    peak = Peak(CPU)
    with tf32(job.tf32):
        rate = samples_per_second(job.probe(), PROBE_S)
    rate = None if rate is None else rate * workers
    memory = worker_bytes(job, plan, peak)
    return Estimate(run.id, plan, size, workers, rate, memory, why, job.notes())
