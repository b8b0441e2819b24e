"""What the simulation measures: a shard, a worker's start, and the driver's part of a shard."""

import contextlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import ray
import torch
import zarr

from influence_jobs.gradients import GradNorms
from influence_jobs.jobs.automatic import chosen
from influence_jobs.jobs.samples import SampleJob
from influence_jobs.kinds import find_kind, open_job
from influence_jobs.models.ffdnet import FFDNet
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.ffdnet import FFDNetTask

PATCHES, SHARD, CHANNELS = 2_000_000, 1024, 96
LOAD = """
import sys, time
import infl_cluster.pool
import influence_jobs.kinds.runner as runner
runner.ShardRunner(*sys.argv[1:], threads=1)
print(time.process_time())
"""


def measured_shards(count: int, patches: int) -> tuple[float, ...]:
    """Seconds of shards of 1,024 patches, extrapolated from `patches` each."""
    task = FFDNetTask(patch_size=50)
    model = task.model().eval().to(memory_format=torch.channels_last)
    engine = GradNorms(model, ["main.29"], task.losses, reduction="channel")
    ids = torch.arange(len(task.train_data()))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        array = zarr.create_array(
            folder, shape=(SHARD * count, CHANNELS), chunks=(SHARD, CHANNELS), dtype="float32"
        )
        for shard in range(-1, count):  # the first one warms up
            chosen = ids.roll(-97 * shard)[:patches]
            parts: list[torch.Tensor] = []

            def compute(chosen: torch.Tensor = chosen, parts: list[torch.Tensor] = parts) -> None:
                for piece in chosen.split(task.batch_size):
                    parts.append(engine(task.batch(piece, Draw(0)))["main.29"])

            started = time.process_time()
            compute()
            computed = (time.process_time() - started) * SHARD / patches
            norms = torch.cat(parts).repeat(-(-SHARD // patches), 1)[:SHARD].numpy()
            started = time.process_time()
            array[max(shard, 0) * SHARD : (max(shard, 0) + 1) * SHARD] = norms
            if shard >= 0:
                found.append(computed + time.process_time() - started)
    return tuple(found)


def measured_process() -> float:
    """CPU seconds in which Ray starts a worker's process, with an environment of its own."""
    ray.init("local", num_cpus=1, **QUIET)
    try:
        found = []
        for number in range(3):
            environment = {"env_vars": {"NUMBER": str(number)}}
            actor = _Nothing.options(runtime_env=environment).remote()
            found.append(ray.get(actor.began_s.remote()))
            ray.kill(actor)
        return statistics.median(found)
    finally:
        ray.shutdown()


def measured_load() -> float:
    """CPU seconds of a process that becomes a worker: it loads code, model and data."""
    with a_run() as run:
        done = subprocess.run(
            [sys.executable, "-c", LOAD, run.root, run.id],
            env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        )
    return float(done.stdout)


def measured_search(workers: int) -> float:
    """CPU seconds in which each of so many workers looks for a batch size."""
    with a_run() as run:
        job = open_job(run)
        assert isinstance(job, SampleJob)
        len(job.task.train_data())
        started = time.process_time()
        chosen(job, math.ceil(PATCHES / workers))
        return time.process_time() - started


@contextlib.contextmanager
def a_run() -> Iterator[Run]:
    """Norms of layer 11 of FFDNet, not begun."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(FFDNet(color=True).state_dict(), f"{folder}/weights.pt")
        options = {"task": "ffdnet", "layer": ["11"], "checkpoint": [f"{folder}/weights.pt"]}
        (spec,) = find_kind("grad-norms").request_type.of(options).specs(folder, lambda _: None)
        yield Run.create(folder, spec)


QUIET = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}


@ray.remote(num_cpus=1)
class _Nothing:
    def __init__(self) -> None:
        self._began_s = time.process_time()

    def began_s(self) -> float:
        return self._began_s

    def run(self, shard: int) -> int:
        return shard


@ray.remote(num_cpus=10**6)
def _never() -> None:
    """A task that no node has room for: it stays pending."""


def measured_driver() -> tuple[float, float]:
    """Seconds from giving a shard to an actor to its answer; and more for each pending worker."""
    ray.init("local", num_cpus=1, **QUIET)
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
