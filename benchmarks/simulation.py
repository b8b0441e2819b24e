"""Simulate FFDNet norms of two million patches on 1 to 1,024 workers, some slow, some lost.

Measured by this script, in CPU time, because the machine may be busy with other things: the seconds
of a shard in one process with one thread; those in which Ray starts a worker's process; those in
which it loads code, model and data; and those of its search for a batch size, which a run without
--batch-size begins with. A shard is what `infl submit grad-norms --layer 11` makes of 1,024
patches: decode them, add noise, compute a norm for each channel, compress and write them. The
driver's time for each shard is Ray's, measured too, and grows with the number of workers that the
driver waits for. Assumed, and set by options: slow workers, lost nodes, and the bandwidth of the
shared storage. The shards are handed out by `infl_cluster.dispatch`, the code of a real run, with
its retries, backups and slow workers; here its workers are simulated, and its clock jumps. The
driver and the storage serve one shard at a time.

The efficiency is that of the whole run, and of its time after the start. "No backups" is the
latter if slow workers get as many shards as others and nobody takes over from them. The last
columns have the share of the time that a run would save without one of these causes. The largest
share is what limits the run.

    python benchmarks/simulation.py [--full]
"""

import bisect
import heapq
import logging
import math
import random
import statistics
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from harness import header, print_table, use_worker_allocator
from simulation_costs import (
    CHANNELS,
    PATCHES,
    SHARD,
    measured_driver,
    measured_load,
    measured_process,
    measured_search,
    measured_shards,
)

from infl_cluster.dispatch import Dispatch
from infl_cluster.retry import RetryPolicy
from infl_cluster.stragglers import Pace
from influence_jobs.jobs.base import Receipt, Shard

SHARD_MB = SHARD * CHANNELS * 4 / 1e6
WORKERS = tuple(2**i for i in range(11))


@dataclass(frozen=True)
class Cluster:
    """The conditions of a run; times are in seconds.

    Attributes:
        shard_s: Measured seconds of shards; each simulated shard draws one of them.
        start_s: Seconds before a worker's first shard, the search for a batch size included.
        driver_s: The driver's seconds for a shard, and more for each worker that it waits for.
        storage_mb_s: Bandwidth of the shared storage, MB a second.
        slow: Share of the workers that take `slowness` times as long.
        lost_per_hour: Losses of a node an hour.
        node: Workers of a node.
        notice_s: Seconds until the shards of a lost node are given to other workers, and a new node
            takes its place.
    """

    shard_s: tuple[float, ...]
    start_s: float
    driver_s: tuple[float, float]
    storage_mb_s: float
    slow: float
    slowness: float
    lost_per_hour: float
    node: int
    notice_s: float


class SimulatedWorkers:
    """Workers of the project's own dispatch, on a clock that jumps from event to event.

    The driver and the storage serve one shard at a time, in order of time.
    """

    def __init__(self, cluster: Cluster, workers: int, chance: random.Random, horizon: float):
        self._cluster, self._workers, self._chance = cluster, workers, chance
        self._losses = [
            _losses(cluster, horizon, chance) for _ in range(-(-workers // cluster.node))
        ]
        self._slowness: dict[Hashable, float] = {}
        self._given: dict[Hashable, tuple[float, Shard]] = {}
        self._events: list[tuple[float, int, str]] = []
        self._places = deque(range(workers))  # of workers that are not there, or not any more
        self._place_of: dict[Hashable, int] = {}
        self._starting = self._started = 0
        self._driver_at = self._storage_at = self._now = 0.0
        self.idle: list[Hashable] = []

    def now(self) -> float:
        return self._now

    def grow(self, size: int) -> None:
        for _ in range(size - self._starting - len(self.idle) - len(self._given)):
            worker, self._started = self._started, self._started + 1
            slow = self._chance.random() < self._cluster.slow
            self._slowness[worker] = self._cluster.slowness if slow else 1.0
            self._place_of[worker] = self._places.popleft()
            self._starting += 1
            self._at(self._now + self._cluster.start_s, worker, "ready")

    def give(self, worker: Any, shard: Shard) -> str:
        self.idle.remove(worker)
        self._given[worker] = self._now, shard
        first, each = self._cluster.driver_s
        self._driver_at = max(self._now, self._driver_at) + first + each * self._workers
        seconds = self._chance.choice(self._cluster.shard_s) * self._slowness[worker]
        seconds *= (shard.stop - shard.start) / SHARD
        self._at(self._driver_at + seconds, worker, "computed")
        return f"simulated:{worker}"

    def wait(self, timeout_s: float) -> tuple[Hashable, Receipt] | None:
        until = self._now + timeout_s
        while self._events and self._events[0][0] <= until:
            self._now, worker, what = heapq.heappop(self._events)
            if what == "ready":
                self._starting -= 1
                self.idle.append(worker)
                return None
            if worker not in self._given:  # it was ended
                continue
            if what == "computed":
                self._storage_at = max(self._now, self._storage_at)
                self._storage_at += SHARD_MB / self._cluster.storage_mb_s
                self._at(self._storage_at, worker, "written")
            elif what == "written" and (lost := self._lost_at(worker)) is not None:
                self._at(max(self._now, lost + self._cluster.notice_s), worker, "lost")
            else:
                _, shard = self._given[worker]
                if what == "written":
                    del self._given[worker]
                    self.idle.append(worker)
                    return worker, Receipt(shard.id, "done")
                self.end(worker)
                return worker, Receipt(shard.id, "failed", "its node is lost", "transient")
        self._now = until
        return None

    def end(self, worker: Hashable) -> None:
        del self._given[worker]
        self._places.append(self._place_of.pop(worker))

    def _at(self, time_s: float, worker: Any, what: str) -> None:
        heapq.heappush(self._events, (time_s, worker, what))

    def _lost_at(self, worker: Hashable) -> float | None:
        """When the worker's node was lost, if that was since it got its shard."""
        losses = self._losses[self._place_of[worker] // self._cluster.node]
        first = bisect.bisect(losses, self._given[worker][0])
        return losses[first] if first < len(losses) and losses[first] <= self._now else None


class Indifferent(Pace):
    """Expects nothing: no backups, and slow workers get as many shards as others."""

    def expected_s(self, shard: Shard) -> float | None:
        return None


def simulate(
    cluster: Cluster,
    workers: int,
    seed: int,
    *,
    patches: int = PATCHES,
    pace: Pace | None = None,
) -> float:
    """Seconds of a simulated run, from its start to its last shard."""
    chance = random.Random(seed)
    count = -(-patches // SHARD)
    shards = [Shard(f"{i}", i * SHARD, min((i + 1) * SHARD, patches)) for i in range(count)]
    horizon = 5 * count * max(cluster.shard_s) / workers + 1000 * cluster.start_s
    simulated = SimulatedWorkers(cluster, workers, chance, horizon)
    ends: list[float] = []

    def received(receipt: Receipt, again: bool) -> None:
        if receipt.status == "done":
            ends.append(simulated.now())
        elif not again:
            raise RuntimeError(f"shard {receipt.shard} was given up")

    dispatch = Dispatch(
        simulated,
        shards,
        most=workers,
        policy=RetryPolicy(max_attempts=100),
        pace=pace or Pace(),
        stalled_after_s=math.inf,
        on_start=lambda *_: None,
        on_leave=lambda *_: None,
        on_receipt=received,
        on_rescue=lambda *_: None,
        on_idle=lambda: None,
        quiet_s=lambda _: 0.0,
    )
    dispatch.run()
    assert len(ends) == count
    return ends[-1]


def _losses(cluster: Cluster, horizon: float, chance: random.Random) -> list[float]:
    """Times at which a node is lost, in seconds."""
    times, now = [], 0.0
    while cluster.lost_per_hour and now < horizon:
        now += chance.expovariate(cluster.lost_per_hour / 3600)
        times.append(now)
    return times


def main(
    full: Annotated[bool, typer.Option("--full", help="More shards measured, more runs.")] = False,
    storage_mb_s: Annotated[
        float, typer.Option(help="Bandwidth of the shared storage, MB a second.")
    ] = 500.0,
    slow: Annotated[float, typer.Option(help="Share of slow workers.")] = 0.02,
    slowness: Annotated[
        float, typer.Option(help="How many times as long slow workers take.")
    ] = 3.0,
    lost_per_hour: Annotated[float, typer.Option(help="Losses of a node an hour.")] = 0.01,
    node: Annotated[int, typer.Option(help="Workers of a node.")] = 16,
    notice_s: Annotated[float, typer.Option(help="Seconds until a lost node is replaced.")] = 60.0,
) -> None:
    """Print run times, and the number of workers up to which adding workers pays."""
    logging.getLogger("infl_cluster").setLevel(logging.ERROR)
    use_worker_allocator()
    torch.set_num_threads(1)
    header("Simulation: FFDNet norms, two million patches, 1 to 1,024 workers")
    shard_s = measured_shards(20 if full else 6, 256 if full else 64)
    driver_s = measured_driver()
    process_s, load_s = measured_process(), measured_load()
    # Fewer than 64 have work enough for the longest search.
    search_s = {workers: measured_search(max(64, workers)) for workers in WORKERS[6:]}
    cluster = Cluster(
        shard_s, process_s, driver_s, storage_mb_s, slow, slowness, lost_per_hour, node, notice_s
    )
    without: dict[str, dict[str, Any]] = {
        "start": {"start_s": 0.0},
        "slow workers": {"slow": 0.0},
        "lost nodes": {"lost_per_hour": 0.0},
        "driver": {"driver_s": (0.0, 0.0)},
        "storage": {"storage_mb_s": np.inf},
    }
    searches = ", ".join(f"{s:.1f} s with {w:,}" for w, s in search_s.items())
    print(
        f"- measured: {statistics.mean(shard_s):.1f} s a shard of {SHARD:,} patches "
        f"({min(shard_s):.1f}-{max(shard_s):.1f}, {len(shard_s)} shards); driver "
        f"{1e3 * driver_s[0]:.2f} ms a shard and {1e6 * driver_s[1]:.1f} us for each worker; "
        f"{process_s:.1f} s to start a process, {load_s:.1f} s to load; search for a batch size: "
        f"{searches} workers"
    )
    print(
        f"- assumed: {storage_mb_s:g} MB/s of storage, "
        f"{SHARD_MB:.1f} MB a shard; {slow:.0%} of workers {slowness:g} times as slow; "
        f"a node of {node} lost every {1 / lost_per_hour:,.0f} hours, noticed after "
        f"{notice_s:g} s\n"
    )
    seeds = range(15 if full else 5)

    def mean_s(cluster: Cluster, workers: int, patches: int = PATCHES) -> float:
        return statistics.mean(simulate(cluster, workers, s, patches=patches) for s in seeds)

    def blind_s(cluster: Cluster, workers: int) -> float:
        return statistics.mean(simulate(cluster, workers, s, pace=Indifferent()) for s in seeds)

    work_s = statistics.mean(shard_s) * PATCHES / SHARD
    knee, rows = 1, []
    for workers in WORKERS:
        start_s = process_s + load_s + search_s[max(64, workers)]
        here = replace(cluster, start_s=start_s)
        seconds = mean_s(here, workers)
        efficiency = work_s / (workers * seconds)
        started = work_s / (workers * (seconds - start_s))
        blind = work_s / (workers * (blind_s(here, workers) - start_s))
        knee = workers if efficiency >= 0.8 else knee
        gains = {
            name: max(0.0, 1 - mean_s(replace(here, **other), workers) / seconds)
            for name, other in without.items()
        }
        # The rest of the loss: workers that wait for the last shards.
        gains["uneven end"] = max(0.0, 1 - efficiency - sum(gains.values()))
        limit = max(gains, key=lambda name: gains[name])
        parts = [f"{gain:.1%}" for gain in gains.values()]
        shares = [f"{share:.2f}" for share in (efficiency, started, blind)]
        rows.append([f"{workers:,}", f"{seconds:,.0f}", *shares, *parts, limit])
    shares = ["efficiency", "after the start", "no backups"]
    columns = ["workers", "seconds", *shares, *(f"- {name}" for name in gains), "limit"]
    print_table(columns, rows)
    print(f"\nThe knee, the most workers at an efficiency of .8 or more: {knee:,}.\n")
    rows = []
    for patches in (PATCHES, 4 * PATCHES, 16 * PATCHES):
        # A longer run may search as long as a run of this size with fewer workers.
        start_s = process_s + load_s + search_s[max(64, 512 * PATCHES // patches)]
        seconds = mean_s(replace(cluster, start_s=start_s), 512, patches)
        share = work_s * patches / PATCHES / (512 * seconds)
        rows.append([f"{patches:,}", f"{seconds:,.0f}", f"{share:.2f}"])
    print_table(["patches, 512 workers", "seconds", "efficiency"], rows)


if __name__ == "__main__":
    typer.run(main)
