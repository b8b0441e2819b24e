"""The status of a run, which its driver writes to `status.json` about once a second.

A thread writes it, so that a driver that is busy with a shard still shows that it is alive.
Progress is counted in units: samples that went through a model. It includes what workers report of
unfinished shards.
"""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from infl_cluster.speed import Speed
from influence_jobs.errors import StoreError
from influence_jobs.store import layout
from influence_jobs.store.documents import (
    MOST_BYTES,
    Entry,
    NodeShare,
    ProgressFile,
    Status,
    parsed,
)
from influence_jobs.store.process import hangs, oom_kills
from influence_jobs.store.run import Run, now
from influence_jobs.store.status import done_before

if TYPE_CHECKING:  # readers of a status must not load torch
    from infl_cluster.dispatch import Rescue
    from influence_jobs.jobs.base import Plan, Receipt, Shard

BEAT_S = 1.0
MAX_FAILURES = 100  # that a status tells; the log has all of them
QUIET_S = 45.0  # after so long without progress, the status says so
TOLD_S = 30.0  # for so long it says what was done about a slow or hanging worker
LATE_S = 5.0  # a look at the progress that comes later was held up by the store
_COUNTED = {"backup": "backups", "backup won": "backups_won", "stalled": "stalled"}


class _Watched:
    """A clock of the time in which the progress of workers could be seen.

    While the store does not answer it stands still, `LATE_S` after the last look.
    """

    def __init__(self) -> None:
        self._until, self._looked = 0.0, time.monotonic()

    def now(self) -> float:
        return self._until + min(time.monotonic() - self._looked, LATE_S)

    def looks(self) -> None:
        self._until, self._looked = self.now(), time.monotonic()


@dataclass
class _Step:
    """What was last seen of a shard under way, or of the run as a whole."""

    since: float  # of the clock of what could be seen
    workers: list[str] = field(default_factory=list)  # HOST:PID; a shard may have a backup
    units: int = 0

    def sees(self, units: int, at: float) -> None:
        if units != self.units:
            self.units, self.since = units, at


class StatusWriter:
    """Keeps the status file of a run up to date, for the length of a `with` block.

    Args:
        run: The run.
        show: Called with every status that was written.
    """

    def __init__(self, run: Run, show: Callable[[Mapping[str, Any]], None] = lambda _: None):
        self._run = run
        self._show = show
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="status")
        self._units_by_shard: dict[str, int] = {}
        self._running: set[str] = set()
        self._before = 0  # units of shards that an earlier driver finished
        self._resumed: dict[str, int] = {}  # units of unfinished shards from earlier attempts
        self._watched = _Watched()
        self._speed = Speed()
        self._whole = _Step(self._watched.now())
        self._steps: dict[str, _Step] = {}  # of the shards that a worker has
        self._host_of: dict[str, str] = {}  # of the shards that are done
        self._done_on: Counter[str] = Counter()  # shards by host
        self._has_done = False
        self._rescue = "", float("-inf")  # the last one, and when
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
            "backups": 0,
            "backups_won": 0,
            "stalled": 0,
            "computed_again": 0,
            "failures": {},
            "oom_kills": oom_kills(),
        }

    def __enter__(self) -> Self:
        last = self._run.read_json(layout.STATUS, Status)
        if last is not None:  # until there is a plan
            self._status |= done_before(last)
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
        except (OSError, StoreError):
            if error is None:  # a full disk must not hide the run's own error
                raise

    def needs(self, run_ids: Sequence[str]) -> None:
        """Name the runs that are carried out first, in their order."""
        self._status["needs"] = [*run_ids]

    def waits_for(self, run_id: str | None) -> None:
        """Name the run that is carried out first; None if there is none any more."""
        self._status["phase"] = run_id
        self._write()

    def says(self, message: str | None) -> None:
        """Set the message of a running run."""
        self._status["message"] = message

    def planned(self, plan: "Plan", done: Mapping[str, Entry]) -> None:
        """Set the amount of work, and how much of it earlier drivers did."""
        rows = sum(shard.stop - shard.start for shard in plan.shards)
        with self._lock:
            self._units_by_shard = {
                shard.id: plan.units * (shard.stop - shard.start) // rows for shard in plan.shards
            }
            self._before = sum(self._units_by_shard[shard] for shard in done)
            for shard, entry in done.items():
                self._is_done(shard, entry.worker)
            self._running = {shard.id for shard in plan.shards if shard.id not in done}
            self._status |= {
                "shards_total": len(plan.shards),
                "shards_done": len(done),
                "units_total": sum(self._units_by_shard.values()),
                "units_before": self._before,
                "units_done": self._before,
            }
        self._write()

    def started(self, shard: str, worker: str) -> None:
        """Note that a worker, as HOST:PID, has begun a shard."""
        with self._lock:
            step = self._steps.setdefault(shard, _Step(self._watched.now()))
            step.workers.append(worker)
            self._speed.works(True)

    def left(self, shard: str, worker: str) -> None:
        """Note that a worker does not have a shard any more."""
        with self._lock:
            self._steps[shard].workers.remove(worker)
            if not self._steps[shard].workers:
                del self._steps[shard]
            self._speed.works(bool(self._steps))

    def count(self, receipt: "Receipt", *, retried: bool) -> None:
        """Count a shard that is done or has failed."""
        with self._lock:
            if receipt.status == "done":
                self._is_done(receipt.shard, receipt.worker)
                self._has_done = True
                self._running.discard(receipt.shard)
                self._status["shards_done"] += 1
                self._status["failures"].pop(receipt.shard, None)
            else:
                told = self._status["failures"]
                if len(told) < MAX_FAILURES or receipt.shard in told:
                    told[receipt.shard] = receipt.error
                if retried:
                    line = f"shard {receipt.shard}: {receipt.error}; the shard is tried again"
                    self._rescue = line, time.monotonic()
            self._status["retries"] += retried

    def again(self, shards: "Sequence[Shard]") -> None:
        """Count shards that were counted as done and are to be done again."""
        with self._lock:
            self._running |= {shard.id for shard in shards}
            self._status["shards_done"] -= len(shards)
            self._status["computed_again"] += len(shards)
            for shard in shards:
                self._done_on[self._host_of.pop(shard.id)] -= 1

    def rescued(self, rescue: "Rescue", line: str, workers: int = 1) -> None:
        """Count what was done about slow or hanging workers, and say it for a while."""
        with self._lock:
            self._status[_COUNTED[rescue]] += workers
            self._rescue = line, time.monotonic()

    def quiet_s(self, shard: str) -> float:
        """Seconds since a shard made progress; 0 if no worker has it.

        A time in which the store did not answer is left out: progress could not be told.
        """
        with self._lock:
            step = self._steps.get(shard)
            return self._quiet_s(step) if step else 0.0

    def _quiet_s(self, step: _Step) -> float:
        return self._watched.now() - step.since

    def _is_done(self, shard: str, worker: str) -> None:
        self._host_of[shard] = _host(worker)
        self._done_on[_host(worker)] += 1

    def _nodes(self) -> dict[str, NodeShare]:
        steps = self._steps.values()
        at_work = Counter(_host(worker) for step in steps for worker in step.workers)
        return {
            host: {"shards": self._done_on[host], "at_work": at_work[host]}
            for host in sorted({*+self._done_on, *at_work} - {""})  # "" stands for an older version
        }

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self._write()
            except (OSError, StoreError):
                continue  # a full disk: the work itself will report it

    def _write(self) -> None:
        with self._lock:
            running = set(self._running)
        under_way = {}
        names = [f"{layout.PROGRESS}/{name}" for name in self._run.files.names(layout.PROGRESS)]
        try:
            found = self._run.files.read_all(names, most=MOST_BYTES)
            self._watched.looks()
        except StoreError:  # one is no plain file
            found = []
        for name, data in zip(names, found, strict=False):
            shard = PurePosixPath(name).stem
            if shard in running and data is not None:  # it has not just ended
                try:
                    report = parsed(data, ProgressFile, name)
                except StoreError:  # damaged; the worker soon writes it anew
                    continue
                under_way[shard] = report["units"]
                self._resumed[shard] = report.get("resumed", 0)
        with self._lock:
            for shard, units in under_way.items():
                if shard in self._steps:
                    self._steps[shard].sees(units, self._watched.now())
            if self._units_by_shard:
                self._count_units(under_way)
            self._whole.sees(self._status["units_done"], self._watched.now())
            self._status["oom_kills"] = oom_kills()
            status = {**self._status, "updated_at": now()}
            if status["state"] == "running" and not status["message"]:
                line, at = self._rescue
                told = line if time.monotonic() - at < TOLD_S else None
                status["message"] = told or self._what_is_quiet()
            self._run.write_json(layout.STATUS, status)
        self._show(status)

    def _count_units(self, under_way: Mapping[str, int]) -> None:
        self._status["units_before"] = self._before + sum(self._resumed.values())
        finished = [u for s, u in self._units_by_shard.items() if s not in self._running]
        self._status["units_done"] = sum(finished) + sum(
            units for shard, units in under_way.items() if shard in self._running
        )
        self._status["nodes"] = self._nodes()
        began = [step.units > self._resumed.get(s, 0) for s, step in self._steps.items()]
        self._speed.sees(
            self._status["units_done"] - self._status["units_before"],
            all_began=all(began) or self._has_done,
        )
        if (rate := self._speed.rate) is not None:
            self._status["rate"] = rate

    def _what_is_quiet(self) -> str | None:
        """What has made no progress for long, or None."""
        if self._status["phase"]:  # a run that waits for one of its inputs: that one has a status
            self._whole.since = self._watched.now()
        quiet = {s: step for s, step in self._steps.items() if self._quiet_s(step) > QUIET_S}
        if quiet:
            shard, step = max(quiet.items(), key=lambda item: self._quiet_s(item[1]))
            others = f", and in {len(quiet) - 1} more" if len(quiet) > 1 else ""
            processes = "; ".join(_silent(worker) for worker in step.workers)
            said = _time(self._quiet_s(step))
            return f"no progress in shard {shard} for {said}{others}: {processes}"
        if not self._steps and self._quiet_s(self._whole) > QUIET_S:
            return f"no progress for {_time(self._quiet_s(self._whole))}"
        return None


def _host(worker: str) -> str:
    return worker.rpartition(":")[0]


def _silent(worker: str) -> str:
    host, _, pid = worker.rpartition(":")
    why = hangs(int(pid)) if host == socket.gethostname() else f"on {host}"
    return f"process {pid}, {why}"


def _time(quiet: float) -> str:
    return f"{quiet:.0f} s" if quiet < 120 else f"{quiet / 60:.0f} minutes"
