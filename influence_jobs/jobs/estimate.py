"""What a job would take, from its plan and a short probe."""

import time
from collections.abc import Iterator

import psutil

from influence_jobs.jobs.base import Plan


def samples_per_second(pieces: Iterator[float], seconds: float) -> float | None:
    """Speed of one worker, from a job's probe; None if the work has no pieces to measure.

    Args:
        pieces: What `Job.probe` gives.
        seconds: How long to measure; one piece is done at least.
    """
    started = time.monotonic()
    first, units = next(pieces, None), 0.0
    if first is None:
        return None
    warm = time.monotonic()
    for done in pieces:
        units += done
        if time.monotonic() - warm > seconds:
            break
    if units == 0:
        return first / (warm - started)
    return units / (time.monotonic() - warm)  # the first piece paid for allocations and caches


def worker_bytes(plan: Plan) -> float:
    """Memory of one worker: this process, which has probed, and the arrays of a shard."""
    rss: int = psutil.Process().memory_info().rss
    return rss + (plan.disk_bytes - plan.file_bytes) / max(1, len(plan.shards))
