"""Shards on Ray: a pool of worker actors, each with one shard at a time.

Ray retries nothing: the loop replaces a dead worker itself, so that `RetryPolicy` alone decides
about every failed attempt. A shard may be computed twice; its bytes are the same each time.
"""

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any, cast

import ray
import torch

from infl_cluster import shipping, store_access, versions
from infl_cluster.actors import Actor, Actors, live_actors
from infl_cluster.dispatch import STALLED_AFTER_S, Dispatch, Rescue
from infl_cluster.how import room_on
from infl_cluster.metrics import RunMetrics, WorkerMetrics
from infl_cluster.nodes import require_same_software
from infl_cluster.retry import RetryPolicy
from infl_cluster.room import lack, wanted
from infl_cluster.stragglers import Pace
from influence_jobs.devices import MALLOC, Device, resolved, spins
from influence_jobs.errors import DataError, InflError, RuntimeFault, StoreError
from influence_jobs.gpu import require_usable
from influence_jobs.jobs.base import Receipt, Shard
from influence_jobs.kinds.runner import progress_every_s, this_process
from influence_jobs.memory import share_gpu
from influence_jobs.store.files import open_files
from influence_jobs.store.lease import holder_of, require_held_by
from influence_jobs.store.object_files import be_patient
from influence_jobs.store.run import Run
from influence_jobs.tasks.trust import trust_all
from influence_jobs.terms import duration

log = logging.getLogger(__name__)

TELL_S = 5.0  # say that there is no room only after this long: a placed worker starts in seconds
ASK_S = 5.0  # so often a driver looks whether Ray still answers
SILENT = (
    "Ray does not answer any more: its head has died or is out of reach; if it does not come back "
    "within a minute, start Ray again and resume the run"
)
LOADING_S = 45.0  # and that workers load their model and data only after this long


def connect() -> None:
    """Connect a submitted driver to the cluster that runs it.

    Raises:
        RuntimeFault: This process is not a submitted job: RAY_ADDRESS is not set.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        raise RuntimeFault("RAY_ADDRESS is not set: a driver is started by submitting a run")
    ours = signal.getsignal(signal.SIGTERM)
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    signal.signal(signal.SIGTERM, ours)  # Ray's own handler knows no cause


def why_ended() -> str | None:
    """Why this driver is being ended, if it is because the Ray that it was submitted to has died.

    Who stops a run leaves Ray as it is, and so does who stops Ray in order: it ends the jobs first.
    """
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError):
        return "the Ray that computed it has died, or parts of it; the run can be resumed"
    return None


class ShardWorker:
    """The actor: holds one runner and passes shards to it.

    Args:
        root: Folder of all runs.
        run_id: Id of the run.
        kind: Kind of the job, for the metrics.
        device: A torch device, or `auto`: a GPU, if torch finds one here.
        threads: Threads of one torch operation.
        runner: `module:class` of the runner; tests name their own.
        gpu_share: Part of a GPU's memory that it may take, where others share the GPU; 0 if it
            reserves none.
        workers: Workers of the run: the more there are, the less often each writes its progress.
        owner: Of the lease that the driver holds; None for runners without a run folder.
    """

    def __init__(
        self,
        root: str,
        run_id: str,
        *,
        kind: str,
        device: str,
        threads: int,
        runner: str,
        gpu_share: float = 0.0,
        workers: int = 1,
        owner: str | None = None,
    ) -> None:
        module, _, name = runner.partition(":")
        self._runner: Any = None
        self._refusal: str | None = None
        trust_all()  # who submitted the run has been asked
        store_access.take()
        shipping.unpack()
        self._device, self._reserves_gpu = device, gpu_share > 0
        try:
            versions.require_same()
            be_patient()  # a store that does not answer now is no reason to go without this worker
            if owner is not None:
                require_held_by(open_files(root).sub(run_id), owner)
            self._device = resolved(cast(Device, device))
            if self._device == "cuda" and 0 < gpu_share < 1:
                share_gpu(gpu_share)
            if self._device == "cuda":  # else a new worker of a dead GPU would fail shard by shard
                require_usable(torch.device("cuda"))
            make_runner = getattr(import_module(module), name)
            self._runner = make_runner(
                root, run_id, device=self._device, threads=threads, workers=workers
            )
        except Exception as error:  # kept: if raised here, the driver would see a dead worker
            if not isinstance(error, InflError):
                log.exception("the worker cannot be made")
            self._refusal = _refusal(error)
        self._metrics = WorkerMetrics(run_id, kind, root, this_process())

    def __repr__(self) -> str:
        return f"ShardWorker({self._runner.title if self._runner else self._refusal})"

    def begin(self) -> tuple[str | None, str, str]:
        """Return why this worker cannot compute its run, or None; its process; its device."""
        device = self._device
        if device == "cpu" and self._reserves_gpu:  # of `auto`: it is slow, and the GPU lies idle
            device = "the CPU, though it reserves a GPU: torch finds none there (infl doctor)"
        return self._refusal, this_process(), device

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
        device: Torch device of a worker; `auto`: GPUs if the cluster offers any.
        num_gpus: GPUs that a worker reserves; by default 1, on the CPU 0.
        node_labels: Labels of Ray that a worker's node must have.
        placement_timeout_s: How long to wait for room for the first worker.
        policy: Which failed shards are tried again.
        stalled_after_s: A worker without progress for so long is replaced.
        runner: `module:class` of the runner of a worker.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        device: str = "cpu",
        num_gpus: float | None = None,
        node_labels: Mapping[str, str] | None = None,
        placement_timeout_s: float = 120.0,
        policy: RetryPolicy | None = None,
        stalled_after_s: float = STALLED_AFTER_S,
        runner: str = "influence_jobs.kinds.runner:ShardRunner",
    ) -> None:
        self._workers = workers
        self._device = device
        self._gpus_asked = num_gpus
        self._node_labels = dict(node_labels or {})
        self._placement_timeout_s = placement_timeout_s
        self._policy = policy or RetryPolicy()
        self._stalled_after_s = stalled_after_s
        self._runner = runner
        self._shown: dict[str, RunMetrics] = {}
        self._answered, self._asked_at = True, float("-inf")

    def run(
        self,
        run: Run,
        shards: Sequence[Shard],
        *,
        on_start: Callable[[str, str], None],
        on_leave: Callable[[str, str], None],
        on_receipt: Callable[[Receipt, bool], None],
        on_rescue: Callable[[Rescue, str, int], None],
        on_idle: Callable[[str | None], None],
        quiet_s: Callable[[str], float],
    ) -> None:
        """Compute all shards; returns when each is done or given up.

        Args:
            run: The run of the shards.
            shards: The shards that are not done.
            on_start: Called with a shard's id and the process that has begun it, as HOST:PID.
            on_leave: Called with the same when the process does not have the shard any more.
            on_receipt: Called with each receipt and whether the shard will be tried again. If the
                worker died, the receipt counts the attempts of this call only.
            on_rescue: Called with what is done about slow or hung workers, a line, their number.
            on_idle: Called about once a second; its argument says what is waited for while there
                is no worker. It may raise to give up.
            quiet_s: Seconds since a shard made progress.

        Raises:
            RuntimeFault: A fatal receipt, no room for any worker, or workers that cannot start.
        """
        workers, threads = self._sizes(len(shards))
        # Not less than three times what lies between two tellings, however short it is asked for.
        stalled_after_s = max(self._stalled_after_s, 3 * progress_every_s(workers))
        require_same_software(
            [node for node in self._live() if self._has_room(node["Resources"], threads)]
        )
        options = {
            "num_cpus": threads,
            "num_gpus": self._num_gpus,
            "label_selector": self._node_labels,
            "runtime_env": {"env_vars": _worker_environment(threads)},
        }
        holder = holder_of(run.files)  # this driver
        owner = holder["owner"] if holder else None
        actors = Actors(
            lambda: self._start_worker(run, options, threads, workers, owner),
            run.spec.kind,
            stalled_after_s,
        )

        def idle() -> None:
            if not self._ray_answers():  # whatever asks it now would wait
                on_idle(SILENT)
                return
            actors.end_stalled_starts()
            on_idle(self._lacks_room(actors, threads))

        dispatch = Dispatch(
            actors,
            shards,
            most=workers,
            policy=self._policy,
            pace=Pace(),
            stalled_after_s=stalled_after_s,
            on_start=on_start,
            on_leave=on_leave,
            on_receipt=on_receipt,
            on_rescue=on_rescue,
            on_idle=idle,
            quiet_s=quiet_s,
        )
        try:
            dispatch.run()
        finally:
            actors.close()

    def show(self, run: Run, status: Mapping[str, Any]) -> None:
        """Pass a run's status on to its metrics, once this process is part of the cluster."""
        if ray.is_initialized():
            if run.id not in self._shown:
                self._shown[run.id] = RunMetrics(run.id, run.spec.kind, run.root)
            self._shown[run.id].show(status)

    @property
    def most_workers(self) -> int:
        """As many as were asked for, or else as the cluster has GPUs or CPUs for now."""
        if self._workers:
            return self._workers
        return room_on(self._nodes(), self._num_gpus)

    @cached_property
    def _num_gpus(self) -> float:
        """GPUs that a worker reserves."""
        if self._gpus_asked is not None:
            return self._gpus_asked
        if self._device == "auto":
            return float(any(node.get("GPU", 0.0) for node in self._nodes()))
        return float(self._device != "cpu")

    def _sizes(self, num_shards: int) -> tuple[int, int]:
        """The number of workers, and the threads of each."""
        workers = min(self.most_workers, num_shards)
        cpus = [int(node.get("CPU", 0)) for node in self._nodes()]
        return workers, max(1, min(max(cpus, default=1), sum(cpus) // workers))

    def _has_room(self, resources: Mapping[str, float], threads: int) -> bool:
        """Whether a node is large enough for a worker."""
        return resources.get("CPU", 0) >= threads and resources.get("GPU", 0) >= self._num_gpus

    def _nodes(self) -> list[dict[str, float]]:
        """The resources of the live nodes with the labels that were asked for."""
        return [node["Resources"] for node in self._live()]

    def _live(self) -> list[dict[str, Any]]:
        if not ray.is_initialized():
            connect()
        labels = self._node_labels.items()
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        return [node for node in nodes if node["Alive"] and labels <= node["Labels"].items()]

    def _start_worker(
        self,
        run: Run,
        options: Mapping[str, Any],
        threads: int,
        workers: int,
        owner: str | None,
    ) -> Actor:
        return (
            ray.remote(ShardWorker)
            .options(**options)
            .remote(
                run.root,
                run.id,
                kind=run.spec.kind,
                # Whoever reserves no GPU is to find none.
                device="cpu" if self._device == "auto" and not self._num_gpus else self._device,
                threads=threads,
                runner=self._runner,
                gpu_share=min(1.0, self._num_gpus),
                workers=workers,
                owner=owner,
            )
        )

    def _ray_answers(self) -> bool:
        if time.monotonic() - self._asked_at > ASK_S:
            self._answered, self._asked_at = why_ended() is None, time.monotonic()
        return self._answered

    def _lacks_room(self, actors: Actors, threads: int) -> str | None:
        """What is waited for while there is no worker; None if there is one.

        Raises:
            RuntimeFault: No node is large enough for one, and none has joined for too long.
        """
        waited = actors.waited_s
        if waited < TELL_S:
            return actors.refusal or None
        # A worker with a pid has a place: it is still loading its model and data.
        if places := [actor.pid for actor in live_actors() if actor.pid]:
            if waited < LOADING_S:
                return None
            pids = ", ".join(map(str, places))
            return f"workers have loaded the model and the data for {waited:.0f} s (process {pids})"
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        found = lack(
            [(node["Resources"], node["Labels"]) for node in nodes if node["Alive"]],
            cpus=threads,
            gpus=self._num_gpus,
            labels=self._node_labels,
        )
        if found is None:
            return (
                f"waiting for room for a worker ({wanted(threads, self._num_gpus)}): the nodes "
                "have other work, or one was lost a moment ago"
            )
        said, cure = found
        if waited < self._placement_timeout_s:
            left = duration(self._placement_timeout_s - waited)
            return f"waiting for a node: {said}; the run ends in {left} if none joins ({cure})"
        raise RuntimeFault(f"{said}; {cure}")


def _refusal(error: Exception) -> str:
    """Why a worker cannot compute, with its node if there are several."""
    said = str(error) if isinstance(error, InflError) else f"{type(error).__name__}: {error}"
    if len(ray.nodes()) == 1:  # type: ignore[no-untyped-call]
        return said
    hint = ""
    if isinstance(error, StoreError):
        hint = " (--node-label chooses the nodes that compute)"
    elif isinstance(error, DataError | OSError) or isinstance(error.__cause__, OSError):
        hint = (
            " (each node that computes needs the data and weights, at the same place or on storage "
            "that all share; --node-label chooses nodes)"
        )
    return f"on node {socket.gethostname()}: {said}{hint}"


def _worker_environment(threads: int) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= MALLOC | spins()
    if "PYTHONPATH" in os.environ:  # leads to the user's own task
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return environment | dict(store_access.for_workers())
