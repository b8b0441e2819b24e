"""Shards on Ray: a pool of worker actors, each with one shard at a time.

Ray retries nothing: the loop replaces a dead worker itself, so that `RetryPolicy` alone decides
about every failed attempt. A shard may be computed twice; its bytes are the same each time.
"""

import logging
import os
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import ray
import ray.exceptions
import ray.util.state
from ray.util.state.exception import RayStateApiException

from infl_cluster import store_access
from infl_cluster.metrics import RunMetrics
from infl_cluster.retry import Decision, RetryPolicy
from influence_jobs.errors import InflError, RuntimeFault
from influence_jobs.jobs.base import Receipt, Shard
from influence_jobs.kinds.runner import this_process
from influence_jobs.store.process import oom_kills
from influence_jobs.store.run import Run
from influence_jobs.tasks.trust import trust_all

log = logging.getLogger(__name__)

Actor = Any  # Ray adds the methods of an actor's handle at run time

WAIT_S = 0.5
IDLE_S = 1.0
START_ATTEMPTS = 3
STATE_TIMEOUT_S = 5
TELL_S = 5.0  # say that there is no room only after this long: a placed worker starts in seconds
LOADING_S = 45.0  # and that workers load their model and data only after this long
OUT_OF_MEMORY = (
    "worker died: this machine killed it for lack of memory; resume with fewer --workers, or "
    "delete the run's folder and submit with a smaller --batch-size"
)
# glibc keeps large freed buffers: to give them back and fault them in again costs time.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    "MALLOC_TOP_PAD_": "67108864",
}


def connect() -> None:
    """Connect a submitted driver to the cluster that runs it.

    Raises:
        RuntimeFault: This process is not a submitted job: RAY_ADDRESS is not set.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        raise RuntimeFault("RAY_ADDRESS is not set: a driver is started by submitting a job")
    ours = signal.getsignal(signal.SIGTERM)
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    signal.signal(signal.SIGTERM, ours)  # Ray's own handler knows no cause


def why_ended() -> str | None:
    """Why this driver is being ended, if it is because the Ray that it was submitted to has died.

    Who stops a run leaves Ray as it is, and so does who stops Ray in order: it ends the jobs first.
    """
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return "the Ray that computed it has died, or parts of it; the run can be resumed"
    return None


class ShardWorker:
    """The actor: holds one runner and passes shards to it.

    Args:
        root: Folder of all runs.
        run_id: Id of the run.
        kind: Kind of the job, for the metrics.
        device: A torch device.
        threads: Threads of one torch operation.
        runner: `module:class` of the runner; tests name their own.
    """

    def __init__(
        self, root: str, run_id: str, *, kind: str, device: str, threads: int, runner: str
    ) -> None:
        module, _, name = runner.partition(":")
        self._runner: Any = None
        self._refusal: str | None = None
        trust_all()  # who submitted the run has been asked
        store_access.take()
        try:
            make_runner = getattr(import_module(module), name)
            self._runner = make_runner(root, run_id, device=device, threads=threads)
        except InflError as error:  # kept: if raised here, the driver would see a dead worker
            self._refusal = str(error)
        except Exception as error:
            log.exception("the worker cannot be made")
            self._refusal = f"{type(error).__name__}: {error}"
        self._metrics = RunMetrics(run_id, kind)

    def __repr__(self) -> str:
        return f"ShardWorker({self._runner.title if self._runner else self._refusal})"

    def begin(self) -> tuple[str | None, str]:
        """Return why this worker cannot compute its run, or None if it can; and its process."""
        return self._refusal, this_process()

    def run(self, shard: Shard) -> Receipt:
        """Compute one shard."""
        receipt: Receipt = self._runner.run(shard)
        if receipt.status == "done":
            self._metrics.finished(receipt)
        return receipt


class RayBackend:
    """Computes shards on actors of the cluster that this driver was submitted to.

    The workers share the CPUs of the cluster equally: each reserves as many CPUs as it uses
    threads, at most those of the largest node.

    Args:
        workers: Largest number of actors; by default one for each GPU, or for each CPU if the
            device is the CPU. There are fewer if there are fewer shards or no room for all.
        device: Torch device of a worker.
        num_gpus: GPUs that a worker reserves; by default 1 on cuda.
        placement_timeout_s: How long to wait for room for the first worker.
        policy: Which failed shards are tried again.
        runner: `module:class` of the runner of a worker.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        device: str = "cpu",
        num_gpus: float | None = None,
        placement_timeout_s: float = 120.0,
        policy: RetryPolicy | None = None,
        runner: str = "influence_jobs.kinds.runner:ShardRunner",
    ) -> None:
        self._workers = workers
        self._device = device
        self._num_gpus = (device != "cpu") * 1.0 if num_gpus is None else num_gpus
        self._placement_timeout_s = placement_timeout_s
        self._policy = policy or RetryPolicy()
        self._runner = runner

    def run(
        self,
        run: Run,
        shards: Sequence[Shard],
        *,
        on_start: Callable[[str, str], None],
        on_receipt: Callable[[Receipt, bool], None],
        on_idle: Callable[[str | None], None],
    ) -> None:
        """Compute all shards; returns when each is done or given up.

        Args:
            run: The run of the shards.
            shards: The shards that are not done.
            on_start: Called with a shard's id and the process that has begun it, as HOST:PID.
            on_receipt: Called with each receipt and whether the shard will be tried again. If the
                worker died, the receipt counts the attempts of this call only.
            on_idle: Called about once a second; its argument says what is waited for while there
                is no worker. It may raise to give up.

        Raises:
            RuntimeFault: A fatal receipt, no room for any worker, or workers that cannot start.
        """
        if not ray.is_initialized():
            connect()
        workers, threads = self._sizes(len(shards))
        options = {
            "num_cpus": threads,
            "num_gpus": self._num_gpus,
            "runtime_env": {"env_vars": _worker_environment(threads)},
        }
        metrics = RunMetrics(run.id, run.spec.kind)
        by_id = {shard.id: shard for shard in shards}
        todo = deque(shards)
        tries: Counter[str] = Counter()
        idle_at = time.monotonic()
        pool = _Pool(lambda: self._start_worker(run, options, threads), run.spec.kind)
        try:
            while todo or pool.busy:
                pool.grow(min(workers, len(todo) + len(pool.busy)))
                while todo and pool.idle:
                    shard = todo.popleft()
                    on_start(shard.id, pool.give(shard))
                receipt = pool.wait(WAIT_S)
                if receipt is not None:
                    tries[receipt.shard] += 1
                    if self._settle(receipt, tries[receipt.shard], on_receipt):
                        metrics.retried()
                        todo.append(by_id[receipt.shard])
                if time.monotonic() - idle_at >= IDLE_S:
                    idle_at = time.monotonic()
                    on_idle(self._lacks_room(pool, threads))
        finally:
            pool.close()

    def _settle(
        self, receipt: Receipt, tries: int, on_receipt: Callable[[Receipt, bool], None]
    ) -> bool:
        """Pass a receipt on, and return whether its shard is tried again."""
        if receipt.status == "done":
            on_receipt(receipt, False)
            return False
        # The manifest also counts attempts of earlier drivers; the limit does not.
        decision = self._policy.decide(replace(receipt, attempt=tries))
        again = decision is Decision.RETRY
        on_receipt(replace(receipt, attempt=max(tries, receipt.attempt)), again)
        if decision is Decision.ABORT:
            raise RuntimeFault(receipt.error or "the run cannot go on")
        return again

    def _sizes(self, num_shards: int) -> tuple[int, int]:
        """The number of workers, and the threads of each."""
        total = ray.cluster_resources()  # type: ignore[no-untyped-call]
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        largest = max((int(n["Resources"].get("CPU", 0)) for n in nodes if n["Alive"]), default=1)
        cpus = int(total.get("CPU", 1))
        default = int(total.get("GPU", 0) / self._num_gpus) if self._num_gpus else cpus
        workers = max(1, min(self._workers or default, num_shards))
        return workers, max(1, min(largest, cpus // workers))

    def _start_worker(self, run: Run, options: Mapping[str, Any], threads: int) -> Actor:
        return (
            ray.remote(ShardWorker)
            .options(**options)
            .remote(
                run.root,
                run.id,
                kind=run.spec.kind,
                device=self._device,
                threads=threads,
                runner=self._runner,
            )
        )

    def _lacks_room(self, pool: "_Pool", threads: int) -> str | None:
        """What is waited for while there is no worker; None if there is one.

        Raises:
            RuntimeFault: No node is large enough for one, and none has joined for too long.
        """
        waited = pool.waited_s
        if waited < TELL_S:
            return None
        # A worker with a pid has a place: it is still loading its model and data.
        if places := [actor.pid for actor in _live_actors() if actor.pid]:
            if waited < LOADING_S:
                return None
            pids = ", ".join(map(str, places))
            return f"workers have loaded the model and the data for {waited:.0f} s (process {pids})"
        nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
        offers = "; ".join(f"CPU {n.get('CPU', 0):g}, GPU {n.get('GPU', 0):g}" for n in nodes)
        offers = offers or "none of which is up"
        asked = f"CPU {threads}, GPU {self._num_gpus:g}"
        if any(n.get("CPU", 0) >= threads and n.get("GPU", 0) >= self._num_gpus for n in nodes):
            return f"waiting until other work on the cluster leaves room for a worker ({asked})"
        if waited < self._placement_timeout_s:
            return f"waiting for a node with room for a worker ({asked}; nodes: {offers})"
        raise RuntimeFault(
            f"no node has room for a worker: each asks for {asked}, the nodes have {offers}; "
            "lower --num-gpus, or add a node"
        )


class _Pool:
    """Actors by their state: starting, idle, or busy with a shard.

    Args:
        start: Starts one actor.
        task_name: Name of every task on the dashboard.
    """

    def __init__(self, start: Callable[[], Actor], task_name: str) -> None:
        self._start = start
        self._task_name = task_name
        self._starting: dict[ray.ObjectRef[Any], Actor] = {}
        self._processes: dict[Actor, str] = {}
        self.idle: list[Actor] = []
        self.busy: dict[ray.ObjectRef[Any], tuple[Actor, Shard, float]] = {}
        self._failed_starts = 0
        self._had_worker_at = time.monotonic()
        self._oom_kills = oom_kills() or 0

    @property
    def waited_s(self) -> float:
        """Seconds since there was a worker that could take a shard; 0 if there is one."""
        if self.idle or self.busy:
            self._had_worker_at = time.monotonic()
        return time.monotonic() - self._had_worker_at

    def grow(self, size: int) -> None:
        """Start actors until there are `size`."""
        for _ in range(size - len(self._starting) - len(self.idle) - len(self.busy)):
            actor = self._start()
            # The answer comes when the actor has a place and its runner is made.
            self._starting[actor.begin.remote()] = actor

    def give(self, shard: Shard) -> str:
        """Give a shard to an idle actor; returns its process, as HOST:PID."""
        actor = self.idle.pop()
        reference = actor.run.options(name=self._task_name).remote(shard)
        self.busy[reference] = (actor, shard, time.monotonic())
        return self._processes[actor]

    def wait(self, timeout_s: float) -> Receipt | None:
        """Wait until one actor has started or finished a shard; return the receipt of the shard.

        Raises:
            RuntimeFault: Workers refuse the run or die before they can take a shard.
        """
        references = [*self.busy, *self._starting]
        try:
            finished, _ = ray.wait(references, num_returns=1, timeout=timeout_s)
        except SystemError as error:  # how Ray's C code passes on what a signal's handler raised
            raise (error.__cause__ or error) from None
        if not finished:
            return None
        if finished[0] in self._starting:
            self._welcome(finished[0])
            return None
        actor, shard, since = self.busy.pop(finished[0])
        try:
            receipt: Receipt = ray.get(finished[0])
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            ray.kill(actor)  # it may be alive, only out of reach
            del self._processes[actor]
            seconds = time.monotonic() - since
            return Receipt(shard.id, "failed", self._why_died(error), "transient", seconds=seconds)
        self.idle.append(actor)
        return receipt

    def close(self) -> None:
        """End all actors."""
        for actor in [*self._starting.values(), *self.idle, *(a for a, _, _ in self.busy.values())]:
            ray.kill(actor)

    def _why_died(self, error: Exception) -> str:
        """Why a worker died, in a line. A machine that kills one for memory tells it in no word."""
        before, self._oom_kills = self._oom_kills, oom_kills() or 0
        one_machine = len(ray.nodes()) == 1  # type: ignore[no-untyped-call]
        if (
            isinstance(error, ray.exceptions.OutOfMemoryError)
            or "running low on memory" in str(error)
            or (one_machine and self._oom_kills > before)
        ):
            return OUT_OF_MEMORY
        return f"worker died: {_cause(error)}"

    def _welcome(self, reference: "ray.ObjectRef[Any]") -> None:
        actor = self._starting.pop(reference)
        try:
            refusal, process = ray.get(reference)
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            self._failed_starts += 1
            if self._failed_starts == START_ATTEMPTS:
                why = self._why_died(error).removeprefix("worker died: ")
                raise RuntimeFault(f"workers die while starting: {why}") from error
            return
        if refusal is not None:
            raise RuntimeFault(refusal)
        self._failed_starts = 0
        self._processes[actor] = process
        self.idle.append(actor)


def _worker_environment(threads: int) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **MALLOC}
    if "PYTHONPATH" in os.environ:  # leads to the user's own task
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return environment | dict(store_access.for_workers())


def _live_actors() -> list[Any]:
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
