"""What many shards and many runs cost: 20,000 shards on Ray, 1,000 runs in a list.

The shards compute nothing: each writes 4 KB. All else is real: driver, workers, lease, manifest,
arrays, status, log. A driver is flat if its time for a shard and its memory do not grow with the
number of shards that are done. Run it from the project's folder, on a machine with nothing else to
do:

    python benchmarks/load.py [--shards 20000] [--runs 1000]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from harness import header, print_table

from infl_cluster import driver
from infl_cluster.head import current_head, ensure_head, stop_head
from infl_cluster.pool import RayBackend
from influence_jobs.jobs.base import Job, Plan, Progress, Receipt, Result, Shard
from influence_jobs.kinds.baseline.spec import BaselineSpec
from influence_jobs.kinds.runner import ShardRunner
from influence_jobs.kinds.train.spec import FileCheckpoint
from influence_jobs.specs.base import AnySpec, TaskSpec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.store import layout
from influence_jobs.store.layout import ArrayLayout
from influence_jobs.store.run import Run
from influence_jobs.store.status import is_done
from influence_jobs.store.verify import find_damage

ROWS, COLUMNS = 64, 16  # of a shard, which is one chunk
PARTS = 4  # the driver's time is told for each quarter of the shards


def spec_of(shards: int) -> BaselineSpec:
    """A spec of a run of so many shards. Only its hash and its number of shards count."""
    return BaselineSpec(
        task=TaskSpec(name="load", options={"shards": shards}, data="none"),
        method="random",
        queries=Queries(items=(Query(test=0),), quantity="loss"),
        checkpoint=FileCheckpoint(path="none", sha256="none"),
        seed=0,
    )


class LoadJob(Job[BaselineSpec]):
    """Many shards that compute nothing."""

    spec_type = BaselineSpec
    title = "load"
    reads_data = False
    task: Any = None

    @staticmethod
    def inputs(spec: Any) -> tuple[AnySpec, ...]:
        return ()

    def plan(self, shard_rows: int | None = None) -> Plan:
        count = int(str(self.spec.task.options["shards"]))
        shape = (count * ROWS, COLUMNS)
        array = ArrayLayout("numbers", shape, 0, ROWS, ("row", "column"))
        shards = tuple(
            Shard(f"{start:09d}-{start + ROWS:09d}", start, start + ROWS)
            for start in range(0, count * ROWS, ROWS)
        )
        return Plan((array,), shards, units=count * ROWS, batch_size=ROWS)

    def run(self, shard: Shard, progress: Progress) -> Result:
        rows = np.arange(shard.start, shard.stop, dtype=np.float32)
        return Result({"numbers": np.repeat(rows[:, None], COLUMNS, axis=1)})

    def probe(self) -> Iterator[float]:
        yield 0.0


class LoadRunner(ShardRunner):
    """A worker of such a run, without a task."""

    def __init__(self, root: str, run_id: str, *, device: str, threads: int) -> None:
        self._run = Run.open(root, run_id)
        self._job = LoadJob(self._run, device=torch.device(device))
        self.title = "load"


class Watched(RayBackend):
    """Notes time, processor time and memory of the driver after each quarter of the shards."""

    def __init__(self, shards: int, workers: int) -> None:
        super().__init__(workers, runner="load:LoadRunner")
        self._quarter = max(1, shards // PARTS)
        self._done = 0
        self.notes: list[tuple[float, float, float]] = []

    def run(self, run: Any, shards: Any, *, on_receipt: Any, **others: Any) -> None:
        def counted(receipt: Receipt, retried: bool) -> None:
            if self._done % self._quarter == 0:
                self._note()
            on_receipt(receipt, retried)
            self._done += 1

        super().run(run, shards, on_receipt=counted, **others)
        self._note()

    def _note(self) -> None:
        own = psutil.Process()
        self.notes.append((time.monotonic(), sum(own.cpu_times()[:2]), own.memory_info().rss))


def timed(act: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def shards_on_ray(folder: Path, shards: int, workers: int) -> None:
    """Carry out a run of many shards, and print what it cost."""
    open_job, require_unchanged = driver.open_job, driver.require_unchanged
    driver.open_job = lambda run, **_: LoadJob(run, device=torch.device("cpu"))
    driver.require_unchanged = lambda *_: None
    run = Run.create(str(folder), spec_of(shards))
    backend = Watched(shards, workers)
    try:
        whole = timed(lambda: driver.drive(run.root, run.id, backend))
    finally:
        driver.open_job, driver.require_unchanged = open_job, require_unchanged
    rows = []
    for i, (before, after) in enumerate(zip(backend.notes, backend.notes[1:], strict=False)):
        seconds, cpu = after[0] - before[0], after[1] - before[1]
        rows.append(
            [
                f"{i + 1} of {PARTS}",
                f"{backend._quarter / seconds:.0f}",
                f"{1e3 * cpu / backend._quarter:.2f}",
                f"{after[2] / 2**20:.0f}",
            ]
        )
    print(f"\n## {shards:,} shards on {workers} workers\n")
    print_table(["quarter", "shards/s", "driver's CPU, ms a shard", "its memory, MB"], rows)
    again = Run.open(run.root, run.id)
    costs = {
        "the whole run": whole,
        "is it done?": timed(lambda: is_done(again)),
        "digest": timed(again.digest),
        "verify": timed(lambda: find_damage(again)),
    }
    assert is_done(again)
    print()
    print_table(["", "seconds"], [[name, f"{value:.2f}"] for name, value in costs.items()])


def many_runs(folder: Path, count: int) -> None:
    """List many runs, and print what it cost."""
    from infl_cli.runs import list_runs

    status = {
        "state": "done", "phase": None, "message": None, "started_at": 1.0, "updated_at": 2.0,
        "shards_done": 1, "shards_total": 1, "units_before": 0, "units_done": 3, "units_total": 3,
        "retries": 0, "failures": {},
    }  # fmt: skip
    for i in range(count):
        run = Run.create(str(folder), spec_of(i + 1))
        run.write_json(layout.STATUS, status)
    code = "from infl_cli.entry import main; main()"
    command = [sys.executable, "-c", code, "runs", "--json", "--runs", str(folder)]
    found: list[int] = []

    def whole() -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(len(json.loads(done.stdout)["runs"]))

    stdout, sys.stdout = sys.stdout, Path(os.devnull).open("w")  # noqa: SIM115
    try:
        alone = min(timed(lambda: list_runs(str(folder), json=True)) for _ in range(3))
    finally:
        sys.stdout = stdout
    seconds = min(timed(whole) for _ in range(3))
    assert found[-1] == count
    print(f"\n## {count:,} runs\n")
    rows = [["infl runs, after imports", f"{alone:.2f}"], ["the whole command", f"{seconds:.2f}"]]
    print_table(["", "seconds"], rows)


def with_ray(folder: Path, shards: int, workers: int) -> None:
    """Do the run in a process of its own: Ray reads its settings only once, on import."""
    warm_before = current_head() is not None
    head = ensure_head(idle_timeout_s=600)
    environment = {
        **os.environ,
        "RAY_ADDRESS": head.gcs_address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(head.token_path),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as jobs have it from the Ray that runs them
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    words = [f"--shards={shards}", f"--workers={workers}", f"--driver-in={folder}"]
    try:
        subprocess.run([sys.executable, __file__, *words], env=environment, check=True)
    finally:
        if not warm_before:
            stop_head(head)


def main(
    shards: Annotated[int, typer.Option(help="Shards of the one run; 0 for none.")] = 20_000,
    runs: Annotated[int, typer.Option(help="Runs to list; 0 for none.")] = 1000,
    workers: Annotated[int, typer.Option(help="Ray's workers.")] = 2,
    driver_in: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print the costs."""
    torch.set_num_threads(1)
    if driver_in is not None:
        shards_on_ray(driver_in, shards, workers)
        return
    header("Many shards, many runs")
    with tempfile.TemporaryDirectory() as folder:
        if runs:
            many_runs(Path(folder, "many"), runs)
        if shards:
            with_ray(Path(folder, "one"), shards, workers)


if __name__ == "__main__":
    typer.run(main)
