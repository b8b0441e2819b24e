"""Simulate FFDNet norms of two million patches on 1 to 1,024 workers, some slow, some lost.

Measured by this script: the seconds of a shard in one process with one thread, and the driver's
time for each shard. A shard is: decode patches, add noise, compute norms of layer 11, compress and
write an array of its size. The driver's time is Ray's, and grows with the number of workers that
the driver waits for. Assumed, and set by options: the seconds before a worker's first shard, slow
workers, lost nodes, and the bandwidth of the shared storage. As in a job, a worker takes the next
shard when it has finished one. The driver and the storage serve one shard at a time. The shards of
a lost node are computed again.

The last columns have the share of the time that a run would save without one of these causes. The
largest share is what limits the run.

    python benchmarks/simulation.py [--full]
"""

import bisect
import heapq
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import ray
import torch
import typer
import zarr
from harness import header, print_table, seconds_of, use_worker_allocator

from influence_jobs.gradients import GradNorms
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.ffdnet import FFDNetTask

PATCHES, SHARD = 2_000_000, 1024
SHARD_MB = SHARD * 96 * 9 * 4 / 1e6
WORKERS = tuple(2**i for i in range(11))


@dataclass(frozen=True)
class Cluster:
    """The conditions of a run; times are in seconds.

    Attributes:
        shard_s: Measured seconds of shards; each simulated shard draws one of them.
        start_s: Seconds before a worker's first shard.
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


def simulate(cluster: Cluster, workers: int, seed: int) -> float:
    """Seconds of a simulated run, from its start to its last shard."""
    chance = random.Random(seed)
    left = -(-PATCHES // SHARD)
    slowness = [cluster.slowness if chance.random() < cluster.slow else 1.0 for _ in range(workers)]
    horizon = 5 * left * max(cluster.shard_s) / workers + 1000 * cluster.start_s
    losses = [_losses(cluster, horizon, chance) for _ in range(-(-workers // cluster.node))]
    given_at = [0.0] * workers
    # Events (time, what, worker), in order of time: driver and storage serve in that order.
    events = [(cluster.start_s, "ready", worker) for worker in range(workers)]
    idle: list[int] = []
    driver_at = storage_at = end = 0.0
    unfinished = left
    while unfinished:
        now, what, worker = heapq.heappop(events)
        if what == "ready":
            if not left:  # idle until a lost shard comes back
                idle.append(worker)
                continue
            left -= 1
            given_at[worker] = now
            driver_at = max(now, driver_at) + cluster.driver_s[0] + cluster.driver_s[1] * workers
            seconds = chance.choice(cluster.shard_s) * slowness[worker]
            heapq.heappush(events, (driver_at + seconds, "computed", worker))
        elif what == "computed":
            storage_at = max(now, storage_at) + SHARD_MB / cluster.storage_mb_s
            heapq.heappush(events, (storage_at, "written", worker))
        elif what == "written":
            of_node = losses[worker // cluster.node]
            first = bisect.bisect(of_node, given_at[worker])
            if first < len(of_node) and of_node[first] <= now:
                noticed = of_node[first] + cluster.notice_s
                heapq.heappush(events, (max(now, noticed), "lost", worker))
            else:
                unfinished, end = unfinished - 1, now
                heapq.heappush(events, (now, "ready", worker))
        else:
            left += 1
            back = [(now + cluster.start_s, "ready", worker)]
            back += [(now, "ready", idle.pop())] if idle else []
            for event in back:
                heapq.heappush(events, event)
    return end


def _losses(cluster: Cluster, horizon: float, chance: random.Random) -> list[float]:
    """Times at which a node is lost, in seconds."""
    times, now = [], 0.0
    while cluster.lost_per_hour and now < horizon:
        now += chance.expovariate(cluster.lost_per_hour / 3600)
        times.append(now)
    return times


def measured_shards(count: int, patches: int) -> tuple[float, ...]:
    """Seconds of shards of 1,024 patches, extrapolated from `patches` each."""
    task = FFDNetTask(patch_size=50)
    model = task.model().eval().to(memory_format=torch.channels_last)
    engine = GradNorms(model, ["main.29"], task.losses, reduction="kernel")
    ids = torch.arange(len(task.train_data()))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        array = zarr.create_array(
            folder, shape=(SHARD * count, 96, 3, 3), chunks=(SHARD, 96, 3, 3), dtype="float32"
        )
        for shard in range(-1, count):  # the first one warms up
            chosen = ids.roll(-97 * shard)[:patches]
            parts: list[torch.Tensor] = []

            def compute(chosen: torch.Tensor = chosen, parts: list[torch.Tensor] = parts) -> None:
                for piece in chosen.split(task.batch_size):
                    parts.append(engine(task.batch(piece, Draw(0)))["main.29"])

            computed = seconds_of(compute) * SHARD / patches
            norms = torch.cat(parts).repeat(-(-SHARD // patches), 1, 1, 1)[:SHARD].numpy()
            started = time.perf_counter()
            array[max(shard, 0) * SHARD : (max(shard, 0) + 1) * SHARD] = norms
            if shard >= 0:
                found.append(computed + time.perf_counter() - started)
    return tuple(found)


@ray.remote(num_cpus=1)
class _Nothing:
    def run(self, shard: int) -> int:
        return shard


@ray.remote(num_cpus=10**6)
def _never() -> None:
    """A task that no node has room for: it stays pending."""


def measured_driver() -> tuple[float, float]:
    """Seconds from giving a shard to an actor to its answer; and more for each pending worker."""
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        actor = _Nothing.remote()
        ray.get(actor.run.remote(0))
        seconds = {}
        for others in (1, 1024):
            waiting = [_never.remote() for _ in range(others)]
            rounds = []
            for shard in range(30):
                started = time.perf_counter()
                mine = actor.run.remote(shard)
                ray.get(ray.wait([mine, *waiting], num_returns=1)[0])
                rounds.append(time.perf_counter() - started)
            seconds[others] = statistics.median(rounds)
    finally:
        ray.shutdown()
    each = max(0.0, seconds[1024] - seconds[1]) / 1023
    return seconds[1] - each, each


def main(
    full: Annotated[bool, typer.Option("--full", help="More shards measured, more runs.")] = False,
    start_s: Annotated[float, typer.Option(help="Seconds before a worker's first shard.")] = 10.0,
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
    use_worker_allocator()
    torch.set_num_threads(1)
    header("Simulation: FFDNet norms, two million patches, 1 to 1,024 workers")
    shard_s = measured_shards(20 if full else 6, 256 if full else 64)
    driver_s = measured_driver()
    cluster = Cluster(
        shard_s, start_s, driver_s, storage_mb_s, slow, slowness, lost_per_hour, node, notice_s
    )
    without = {
        "start": replace(cluster, start_s=0.0),
        "slow workers": replace(cluster, slow=0.0),
        "lost nodes": replace(cluster, lost_per_hour=0.0),
        "driver": replace(cluster, driver_s=(0.0, 0.0)),
        "storage": replace(cluster, storage_mb_s=np.inf),
    }
    print(
        f"- measured: {statistics.mean(shard_s):.1f} s a shard of {SHARD:,} patches "
        f"({min(shard_s):.1f}-{max(shard_s):.1f}, {len(shard_s)} shards); driver "
        f"{1e3 * driver_s[0]:.2f} ms a shard and {1e6 * driver_s[1]:.1f} us for each worker"
    )
    print(
        f"- assumed: {start_s:g} s to start; {storage_mb_s:g} MB/s of storage, {SHARD_MB:.1f} MB a "
        f"shard; {slow:.0%} of workers {slowness:g} times as slow; a node of {node} lost every "
        f"{1 / lost_per_hour:,.0f} hours, noticed after {notice_s:g} s\n"
    )
    seeds = range(15 if full else 5)

    def mean_s(cluster: Cluster, workers: int) -> float:
        return statistics.mean(simulate(cluster, workers, seed) for seed in seeds)

    work_s = statistics.mean(shard_s) * -(-PATCHES // SHARD)
    knee, rows = 1, []
    for workers in WORKERS:
        seconds = mean_s(cluster, workers)
        efficiency = work_s / (workers * seconds)
        knee = workers if efficiency >= 0.8 else knee
        gains = {
            name: max(0.0, 1 - mean_s(other, workers) / seconds) for name, other in without.items()
        }
        # The rest of the loss: workers that wait for the last shards.
        gains["uneven end"] = max(0.0, 1 - efficiency - sum(gains.values()))
        limit = max(gains, key=lambda name: gains[name])
        parts = [f"{gain:.1%}" for gain in gains.values()]
        rows.append([f"{workers:,}", f"{seconds / 3600:.2f}", f"{efficiency:.2f}", *parts, limit])
    columns = ["workers", "hours", "efficiency", *(f"- {name}" for name in gains), "limit"]
    print_table(columns, rows)
    print(f"\nThe knee, the most workers at an efficiency of .8 or more: {knee:,}.")


if __name__ == "__main__":
    typer.run(main)
