"""Prometheus metrics of a run, exported by Ray as `ray_infl_...` at every node's metrics port.

A worker that is replaced starts its series again at zero: sum over workers with rate(), and read progress
from the run folder.
"""

from ray.util.metrics import Counter, Gauge

from influence_jobs.jobs.base import Receipt

_TAGS = ("run", "kind")


class RunMetrics:
    """What this process did for a run.

    Args:
        run: Run id.
        kind: Kind of the job, e.g. `grad-norms`.
    """

    def __init__(self, run: str, kind: str) -> None:
        self._samples = Counter("infl_samples", "Samples computed.", _TAGS)
        self._done = Counter("infl_shards_done", "Shards finished.", _TAGS)
        self._retries = Counter("infl_shard_retries", "Shards tried again.", _TAGS)
        self._rate = Gauge("infl_samples_per_second", "Rate within the last shard.", _TAGS)
        for metric in (self._samples, self._done, self._retries, self._rate):
            metric.set_default_tags({"run": run, "kind": kind})

    def finished(self, receipt: Receipt) -> None:
        """Count a shard that is done."""
        self._done.inc()
        if receipt.units > 0:
            self._samples.inc(receipt.units)
        if receipt.seconds > 0:
            self._rate.set(receipt.units / receipt.seconds)

    def retried(self) -> None:
        """Count a shard that is tried again."""
        self._retries.inc()
