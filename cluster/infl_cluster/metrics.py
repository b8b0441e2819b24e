"""Prometheus metrics of a run. Ray exports them as `ray_infl_...` at the metrics port of each node.

The counters of a new worker start at zero: use rate() and sum over workers. The progress of a run
is in its folder.
"""

from ray.util.metrics import Counter, Gauge

from infl_cluster.dispatch import Rescue
from influence_jobs.jobs.base import Receipt

_TAGS = ("run", "kind")


class RunMetrics:
    """Counts what this process did for a run.

    Args:
        run: Run id.
        kind: Kind of the job, e.g. `grad-norms`.
    """

    def __init__(self, run: str, kind: str) -> None:
        self._samples = Counter("infl_samples", "Samples computed.", _TAGS)
        self._done = Counter("infl_shards_done", "Shards finished.", _TAGS)
        self._retries = Counter("infl_shard_retries", "Shards tried again.", _TAGS)
        self._backups = Counter("infl_backups", "Backups of slow shards.", _TAGS)
        self._backups_won = Counter("infl_backups_won", "Backups that finished first.", _TAGS)
        self._stalled = Counter("infl_stalled", "Shards whose worker hung and was ended.", _TAGS)
        self._rate = Gauge("infl_samples_per_second", "Rate within the last shard.", _TAGS)
        counts = (self._samples, self._done, self._retries)
        rescues = (self._backups, self._backups_won, self._stalled)
        for metric in (*counts, *rescues, self._rate):
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

    def rescued(self, rescue: Rescue) -> None:
        """Count what was done about a slow or hanging worker."""
        by_name = {
            "backup": self._backups,
            "backup won": self._backups_won,
            "stalled": self._stalled,
        }
        by_name[rescue].inc()
