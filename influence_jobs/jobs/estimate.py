"""What a job would take, from its plan and a short probe."""

import time
from collections.abc import Iterator
from typing import Any

from influence_jobs.jobs.base import Job, Plan
from influence_jobs.memory import Peak


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


def worker_bytes(job: Job[Any], plan: Plan, peak: Peak) -> int:
    """Memory of one worker: what its probe took, the process included, and what a shard keeps.

    Args:
        peak: Since before the probe.
    """
    return peak.most + job.held_bytes(plan)
