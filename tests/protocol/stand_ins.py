"""What stands in for files, threads, clocks and computing in a world of `world.py`."""

import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from infl_cluster import driver as driver_module
from influence_jobs.jobs.base import Plan, Result, Shard
from influence_jobs.kinds import runner as runner_module
from influence_jobs.kinds.runner import ShardRunner, this_process
from influence_jobs.store import lease as lease_module
from influence_jobs.store.manifest import Manifest, checksum
from influence_jobs.store.run import Run

if TYPE_CHECKING:
    from .world import World

WORK_S = 12.0  # the time of a shard, with some heartbeats in it
ATTEMPTS = 3


class Files:
    """Files of the world. Every operation is a step."""

    url = "runs/run"

    def __init__(self, world: "World"):
        self._world = world

    def _step(self, what: str) -> str:
        return self._world.pause(what)

    def read(self, name: str, *, most: int | None = None) -> bytes:
        self._step(f"read {name}")
        found = self._world.files.get(name)
        self._world.note(found)
        if found is None:
            raise FileNotFoundError(name)
        return found

    def read_all(self, names: Sequence[str], *, most: int | None = None) -> list[bytes | None]:
        self._step(f"read {len(names)} files")
        found = [self._world.files.get(name) for name in names]
        self._world.note(found)
        return found

    def names(self, folder: str) -> list[str]:
        self._step(f"names {folder}")
        found = sorted(
            name.removeprefix(f"{folder}/")
            for name in self._world.files
            if name.startswith(f"{folder}/")
        )
        self._world.note(found)
        return found

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        with self._effect(f"write {name}"):
            self._world.files[name] = data
            if durable or self._world.scenario.objects:
                self._world.durable[name] = data

    def create(self, name: str, data: bytes) -> bool:
        created = False
        with self._effect(f"create {name}") as how:
            if name not in self._world.files:
                self._world.files[name] = self._world.durable[name] = data
                created = how != "lost"
            self._world.note(created)
        return created

    def delete(self, name: str) -> None:
        with self._effect(f"delete {name}"):
            self._world.files.pop(name, None)
            self._world.durable.pop(name, None)

    def sync(self, names: Iterable[str]) -> None:
        names = list(names)
        self._step(f"sync {' '.join(names)}")
        for name in names:
            if name in self._world.files:
                self._world.durable[name] = self._world.files[name]

    @contextmanager
    def _effect(self, what: str) -> Iterator[str]:
        how = self._step(what)
        self._world.note(how)
        if how == "error before":
            raise OSError(5, "no answer")
        yield how
        if how == "error after":
            raise OSError(5, "no answer")


class Plain:
    """The files of a world, read after its end."""

    url = "runs/run"

    def __init__(self, files: dict[str, bytes]):
        self._files = files

    def read(self, name: str, *, most: int | None = None) -> bytes:
        if name not in self._files:
            raise FileNotFoundError(name)
        return self._files[name]

    def read_all(self, names: Sequence[str], *, most: int | None = None) -> list[bytes | None]:
        return [self._files.get(name) for name in names]

    def names(self, folder: str) -> list[str]:
        return sorted(n.removeprefix(f"{folder}/") for n in self._files if n.startswith(folder))


def shards_of(count: int) -> list[Shard]:
    return [Shard(f"shard{i}", i, i + 1) for i in range(count)]


class FakeRun(Run):
    """A run in the files of a world, whose array is a file for each shard."""

    def __init__(self, world: "World", files: Any):
        super().__init__("/nowhere", world.spec)
        self.files = files
        self.manifest = Manifest(files)

    @staticmethod
    def right(start: int) -> bytes:
        return f"numbers of {start}".encode()

    def write_rows(self, name: str, start: int, values: Any) -> str:
        file = f"data/{name}/{start}"
        self.files.write(file, values, durable=False)
        self.files.sync([file])
        return checksum(values)

    def read_rows(self, name: str, start: int, stop: int) -> Any:
        return self.files.read(f"data/{name}/{start}")


class FakeJob:
    """A job whose shards are one piece of text each."""

    title = "job"
    device = torch.device("cpu")
    reads_data = False
    used_batch_size = 0

    tells_progress = True

    def __init__(self, world: "World", run: FakeRun):
        self._world, self.run_store = world, run

    def held_bytes(self, plan: Plan) -> int:
        return 0

    def input_digests(self) -> dict[str, str]:
        return {}

    def plan(self, shard_rows: int | None = None) -> Plan:
        return Plan((), tuple(shards_of(self._world.scenario.shards)), units=1, batch_size=1)

    def run(self, shard: Shard, progress: Any) -> Result:
        self._world.sleep(WORK_S)
        self._world.computed[shard.id] = self._world.computed.get(shard.id, 0) + 1
        values: Any = FakeRun.right(shard.start)
        return Result({"numbers": values})

    def finish(self) -> Result:
        return Result()


class Backend:
    """Computes shards in order, by the worker's own code."""

    most_workers = 1

    def __init__(self, world: "World"):
        self._world = world

    def run(
        self, run: Any, shards: Any, *, on_start: Any, on_receipt: Any, on_idle: Any, **_: Any
    ) -> None:
        runner = ShardRunner.__new__(ShardRunner)
        runner._run, runner._job = run, FakeJob(self._world, run)  # type: ignore[assignment]
        runner._tf32, runner._progress_every_s = False, 1.0
        for shard in shards:
            for attempt in range(1, ATTEMPTS + 1):
                on_idle(None)
                on_start(shard.id, this_process())
                receipt = runner.run(shard)
                again = receipt.status != "done" and attempt < ATTEMPTS
                on_receipt(receipt, again)
                if not again:
                    break


class Silent:
    """A status that nobody reads."""

    def planned(self, *_: object) -> None:
        pass

    def says(self, *_: object) -> None:
        pass

    def started(self, *_: object) -> None:
        pass

    def left(self, *_: object) -> None:
        pass

    def count(self, *_: object, **__: object) -> None:
        pass

    def again(self, *_: object) -> None:
        pass

    def quiet_s(self, *_: object) -> float:
        return 0.0


DONE = {
    "state": "done", "phase": None, "message": None, "started_at": 1.0, "updated_at": 2.0,
    "shards_done": 1, "shards_total": 1, "units_before": 0, "units_done": 3, "units_total": 3,
    "retries": 0, "failures": {},
}  # fmt: skip


@contextmanager
def patched() -> Iterator[Callable[["World"], None]]:
    """Let the project's modules see the clock, threads and processes of a world."""
    worlds: list[World] = []

    def world() -> "World":
        return worlds[-1]

    def time_of_day() -> float:
        now = world().now + world().me().of.skew
        world().note(now)
        return now

    class Event:
        def __init__(self) -> None:
            self._set = False

        def set(self) -> None:
            self._set = True

        def is_set(self) -> bool:
            return self._set

        def wait(self, seconds: float) -> bool:
            wakes = world().now + seconds
            world().pause("beat", lambda: self._set or world().now >= wakes, wakes)
            return self._set

    class FakeThread:
        def __init__(self, target: Any, **_: Any):
            self._target = target
            self._thread: Any = None

        def start(self) -> None:
            self._thread = world().spawn(world().me().of, self._target)

        def join(self) -> None:
            thread = self._thread
            world().pause("join", lambda: thread is None or thread.ended)

    def owner() -> Any:
        process = world().me().of
        process.owners += 1
        return types.SimpleNamespace(hex=f"{process.name}x{process.owners}")

    def is_running(pid: int, _started: float) -> bool:
        alive = world().processes[pid - 1].alive
        world().note(alive)
        return alive

    def pid() -> int:
        return world().processes.index(world().me().of) + 1

    fake = types.SimpleNamespace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease_module, "threading", fake(Event=Event, Thread=FakeThread))
        patch.setattr(
            lease_module, "time", fake(time=time_of_day, sleep=lambda s: world().sleep(s))
        )
        patch.setattr(lease_module, "uuid", fake(uuid4=owner))
        patch.setattr(lease_module, "os", fake(getpid=pid))
        patch.setattr(lease_module, "socket", fake(gethostname=lambda: world().me().of.host))
        patch.setattr(lease_module, "psutil", fake(Process=lambda: fake(create_time=lambda: 1.0)))
        patch.setattr(lease_module, "is_running", is_running)
        for module in (driver_module, runner_module):
            patch.setattr(module, "software", dict)
            patch.setattr(module, "now", lambda: 5.0)
        patch.setattr(runner_module, "time", fake(monotonic=lambda: 0.0))
        yield worlds.append
