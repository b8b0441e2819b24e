"""Actors of Ray as workers: each starts, is idle, or has one shard."""

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions
import ray.util.state
from ray.util.state.exception import RayStateApiException

from influence_jobs.errors import RuntimeFault
from influence_jobs.gpu import UNUSABLE
from influence_jobs.jobs.base import Receipt, Shard
from influence_jobs.store.process import oom_kills
from influence_jobs.terms import duration

log = logging.getLogger(__name__)

Actor = Any  # Ray adds the methods of an actor's handle at run time

START_ATTEMPTS = 3
REFUSED_S = 300.0  # after so long a node that could not compute is asked again
STATE_TIMEOUT_S = 5
OUT_OF_MEMORY = (
    "its machine killed it for lack of memory; resume with fewer --workers, or delete the run's "
    "folder and submit with a smaller --batch-size"
)
NODE_LOST = "its node was lost"


class Actors:
    """The workers of `dispatch`, on Ray.

    Args:
        start: Starts one actor.
        task_name: Name of every task on the dashboard.
        stalled_after_s: A worker that loads its model and data for longer is replaced.
    """

    def __init__(self, start: Callable[[], Actor], task_name: str, stalled_after_s: float) -> None:
        self._start = start
        self._task_name = task_name
        self._stalled_after_s = stalled_after_s
        self._starting: dict[ray.ObjectRef[Any], tuple[Actor, float]] = {}
        self._placed: set[Actor] = set()  # of those that start, as seen when last looked at
        self._processes: dict[Actor, str] = {}
        self.idle: list[Actor] = []
        self._busy: dict[ray.ObjectRef[Any], tuple[Actor, Shard, float]] = {}
        self._failed_starts = 0
        self._refusals: list[tuple[float, str]] = []  # of workers that the run goes on without
        self._has_done = False
        self._had_worker_at = time.monotonic()
        self._oom_kills = oom_kills() or 0

    def now(self) -> float:
        """Seconds of a clock that does not jump."""
        return time.monotonic()

    @property
    def waited_s(self) -> float:
        """Seconds since there was a worker that could take a shard; 0 if there is one."""
        if self.idle or self._busy:
            self._had_worker_at = time.monotonic()
        return time.monotonic() - self._had_worker_at

    @property
    def refusal(self) -> str | None:
        """Why the run goes on without a worker, as long as that is not asked again."""
        return self._refusals[-1][1] if self._refusals else None

    def grow(self, size: int) -> None:
        """Start actors until there are `size`, or fewer if some were refused."""
        there = len(self._starting) + len(self.idle) + len(self._busy)
        if not there:  # what was refused once may be right now; else it ends the run
            self._refusals, self._has_done = [], False
        oldest = time.monotonic() - REFUSED_S
        self._refusals = [(at, why) for at, why in self._refusals if at > oldest]
        for _ in range(size - there - len(self._refusals)):
            actor = self._start()
            # The answer comes when the actor has a place and its runner is made.
            self._starting[actor.begin.remote()] = actor, time.monotonic()

    def give(self, worker: Actor, shard: Shard) -> str:
        """Give a shard to an idle actor; returns its process, as HOST:PID."""
        self.idle.remove(worker)
        reference = worker.run.options(name=self._task_name).remote(shard)
        self._busy[reference] = (worker, shard, time.monotonic())
        return self._processes[worker]

    def wait(self, timeout_s: float) -> tuple[Actor, Receipt] | None:
        """Wait until one actor has started or finished a shard; return the latter's receipt.

        Raises:
            RuntimeFault: Workers refuse the run, or die or hang before they can take a shard.
        """
        references = [*self._busy, *self._starting]
        if not references:  # all have just been ended
            return None
        try:
            finished, _ = ray.wait(references, num_returns=1, timeout=timeout_s)
        except SystemError as error:  # how Ray's C code passes on what a signal's handler raised
            raise (error.__cause__ or error) from None
        if not finished:
            return None
        if finished[0] in self._starting:
            self._welcome(finished[0])
            return None
        actor, shard, since = self._busy.pop(finished[0])
        try:
            receipt: Receipt = ray.get(finished[0])
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            seconds = time.monotonic() - since
            process = self._processes[actor]
            log.warning("worker process %s: Ray says: %s", process, _cause(error))
            why = f"worker process {process} is gone: {self._why_died(error)}"
            self._kill(actor)  # it may be alive, only out of reach
            return actor, Receipt(shard.id, "failed", why, "transient", seconds=seconds)
        self.idle.append(actor)
        self._has_done = self._has_done or receipt.status == "done"
        if receipt.kind == "worker":  # else its next worker may take the same shard again
            self._go_on_without("a GPU failed", receipt.error)
        return actor, receipt

    def end(self, worker: Actor) -> None:
        """End an actor, also if it hangs."""
        self.idle = [actor for actor in self.idle if actor != worker]
        self._busy = {r: busy for r, busy in self._busy.items() if busy[0] != worker}
        self._kill(worker)

    def end_stalled_starts(self) -> None:
        """End actors that have had a place for long and still cannot take a shard.

        Raises:
            RuntimeFault: So have all that were started in a row.
        """
        now = time.monotonic()
        old = {r: a for r, (a, at) in self._starting.items() if now - at > self._stalled_after_s}
        if not old:
            return
        placed = {found.actor_id for found in live_actors() if found.pid}
        for reference, actor in old.items():
            self._starting[reference] = actor, now  # if it has no place: ask again later
            if actor._actor_id.hex() not in placed:
                continue
            if actor not in self._placed:  # it may have got its place a moment ago
                self._placed.add(actor)
                continue
            del self._starting[reference]
            ray.kill(actor)
            self._count_failed_start(
                f"workers hang while they load the model and the data: none was ready after "
                f"{duration(self._stalled_after_s)}"
            )

    def close(self) -> None:
        """End all actors."""
        starting = [actor for actor, _ in self._starting.values()]
        for actor in [*starting, *self.idle, *(actor for actor, _, _ in self._busy.values())]:
            ray.kill(actor)

    def _kill(self, actor: Actor) -> None:
        del self._processes[actor]
        ray.kill(actor)

    def _why_died(self, error: Exception) -> str:
        """Why a worker is gone. A machine that kills one for memory tells it in no word."""
        before, self._oom_kills = self._oom_kills, oom_kills() or 0
        one_machine = len(ray.nodes()) == 1  # type: ignore[no-untyped-call]
        if (
            isinstance(error, ray.exceptions.OutOfMemoryError)
            or "running low on memory" in str(error)
            or (one_machine and self._oom_kills > before)
        ):
            return OUT_OF_MEMORY
        if "node has died" in str(error):
            return NODE_LOST
        if "Worker unexpectedly exits" in str(error):  # as its node tells, which is there
            return "it crashed or was killed"
        return "its node was lost, or it crashed or was killed"

    def _welcome(self, reference: "ray.ObjectRef[Any]") -> None:
        actor, _ = self._starting.pop(reference)
        try:
            refusal, process, device = ray.get(reference)
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            why = self._why_died(error)
            if why == NODE_LOST:  # Ray gives a node that is just gone the next workers, too
                log.warning("a worker could not start: %s", why)
                return
            why = why if why == OUT_OF_MEMORY else _cause(error)  # there is no log of its own yet
            self._count_failed_start(f"workers die while starting: {why}", error)
            return
        if refusal is not None:
            others = self._starting or self.idle or self._busy
            if not self._has_done and not (UNUSABLE in refusal and others):
                raise RuntimeFault(refusal)
            # A node that joined later, or a broken GPU: those that can compute go on.
            self._go_on_without("a worker could not start", refusal)
            ray.kill(actor)
            return
        log.info("worker %s computes on %s", process, device)
        self._failed_starts = 0
        self._processes[actor] = process
        self.idle.append(actor)

    def _go_on_without(self, what: str, why: str | None) -> None:
        self._refusals.append(
            (time.monotonic(), f"{what}, and the run goes on without it for a while: {why}")
        )
        log.warning("%s", self.refusal)

    def _count_failed_start(self, why: str, error: Exception | None = None) -> None:
        self._failed_starts += 1
        if self._failed_starts == START_ATTEMPTS:
            raise RuntimeFault(why) from error


def live_actors() -> list[Any]:
    """Return the live actors of this job; `pid` is 0 for those that have no place yet.

    A dashboard that does not answer knows of none.
    """
    job = ray.get_runtime_context().get_job_id()
    try:
        return ray.util.state.list_actors(
            filters=[("job_id", "=", job), ("state", "!=", "DEAD")],
            detail=True,
            timeout=STATE_TIMEOUT_S,
        )
    except (RayStateApiException, OSError):
        return []


def _cause(error: Exception) -> str:
    """Return the cause of death from Ray's message of many lines."""
    text = " ".join(str(error).split())
    detail = text.partition("Worker exit detail: ")[2] or text
    return detail.partition(" Some common causes")[0]
