"""What a driver tells the world about its run, in `status.json`, about once a second.

It is written from a thread, so that it also tells that the driver lives while a shard keeps it busy. Progress is counted
in units (samples passed through a model) and includes what workers report of shards they are still at.
"""

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from influence_jobs.store import layout
from influence_jobs.store.run import Run, now

if TYPE_CHECKING:  # whoever only reads a status must not load torch
    from influence_jobs.jobs.base import Plan, Receipt

BEAT_S = 1.0
QUIET_S = 300.0  # a run that makes no progress for so long says so


class StatusWriter:
    """Keeps a run's status file true while the `with` block lasts."""

    def __init__(self, run: Run):
        self._run = run
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="status")
        self._units_by_shard: dict[str, int] = {}
        self._running: set[str] = set()
        self._before = 0  # units of shards that an earlier driver finished
        self._resumed: dict[str, int] = {}  # units that shards under way had from earlier attempts
        self._last_units, self._moved_at = 0, now()
        self._status: dict[str, Any] = {
            "state": "running",
            "phase": None,
            "message": None,
            "started_at": now(),
            "shards_done": 0,
            "shards_total": None,
            "units_before": 0,
            "units_done": 0,
            "units_total": None,
            "retries": 0,
            "failures": {},
        }

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            self._status["state"] = "done"
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._status["state"] = "stopped"
        else:
            self._status["state"] = "failed"
            self._status["message"] = str(error)
        try:
            self._write()
        except OSError:
            if error is None:  # a full disk must not hide the error that is being told
                raise

    def waits_for(self, run_id: str | None) -> None:
        """Say that another run is carried out first, or no longer."""
        self._status["phase"] = run_id
        self._write()

    def says(self, message: str | None) -> None:
        """Tell something about a run that goes on."""
        self._status["message"] = message

    def planned(self, plan: "Plan", done: Mapping[str, Any]) -> None:
        """Say how much there is to do, and what an earlier driver did."""
        rows = sum(shard.stop - shard.start for shard in plan.shards)
        with self._lock:
            self._units_by_shard = {
                shard.id: plan.units * (shard.stop - shard.start) // rows for shard in plan.shards
            }
            self._before = sum(self._units_by_shard[shard] for shard in done)
            self._running = {shard.id for shard in plan.shards if shard.id not in done}
            self._status |= {
                "shards_total": len(plan.shards),
                "shards_done": len(done),
                "units_total": sum(self._units_by_shard.values()),
                "units_before": self._before,
                "units_done": self._before,
                "work_started_at": now(),
            }
        self._write()

    def count(self, receipt: "Receipt", *, retried: bool) -> None:
        """Count what a worker has finished or failed."""
        with self._lock:
            if receipt.status == "done":
                self._running.discard(receipt.shard)
                self._status["shards_done"] += 1
                self._status["failures"].pop(receipt.shard, None)
            else:
                self._status["failures"][receipt.shard] = receipt.error
            self._status["retries"] += retried

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self._write()
            except OSError:
                continue  # a full disk: the work itself will report it

    def _write(self) -> None:
        with self._lock:
            running = set(self._running)
        under_way = {}
        for name in self._run.files.names(layout.PROGRESS):
            shard = name.removesuffix(".json")
            if shard in running:
                report = self._run.read_json(f"{layout.PROGRESS}/{name}") or {}
                under_way[shard] = report.get("units", 0)
                self._resumed[shard] = report.get("resumed", 0)
        with self._lock:
            self._status["units_before"] = self._before + sum(self._resumed.values())
            finished = [u for s, u in self._units_by_shard.items() if s not in self._running]
            self._status["units_done"] = sum(finished) + sum(
                units for shard, units in under_way.items() if shard in self._running
            )
            # A run that waits for an input has that one's progress.
            if self._status["units_done"] != self._last_units or self._status["phase"]:
                self._last_units, self._moved_at = self._status["units_done"], now()
            quiet = now() - self._moved_at
            status = {**self._status, "updated_at": now()}
            if status["state"] == "running" and not status["message"] and quiet > QUIET_S:
                status["message"] = f"no progress for {quiet / 60:.0f} minutes"
            self._run.write_json(layout.STATUS, status)
