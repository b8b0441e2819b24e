"""Random schedules: one to three faults, each of which strikes a run that is really under way."""

import contextlib
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fault_proxy import CUT, FAILED, LOST, REFUSED, SERVED, at_random
from faults_base import PATIENCE_S, RIGHT, ROWS, SHARDS, World, shard_id, wait_for
from faults_local import DAMAGES as OF_CHUNKS
from faults_local import chunk
from faults_metadata import CURES, cure
from faults_metadata import DAMAGES as OF_FILES
from faults_ray import driver, strike, workers

from influence_jobs.errors import StoreError
from influence_jobs.store.lease import live_holder

NUM_SCHEDULES = 200
WHERE = {"local": 0.78, "s3": 0.12, "ray": 0.10}
FILES = ("spec.json", "plan.json", "status.json", "lease.json", "job.json", "data.zarr/zarr.json",
         "data.zarr/norms/zarr.json", "data.zarr/norms/head/zarr.json")  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A fault, and the shard at which the run is when it strikes."""

    at: int
    what: str


@dataclass(frozen=True)
class Schedule:
    seed: int
    where: str
    steps: tuple[Step, ...]
    cured: bool
    """Whether poisoned samples are cured in the end; else the run stays incomplete."""

    def __str__(self) -> str:
        return f"seed {self.seed} ({self.where}): " + ", ".join(
            f"{step.what} at shard {step.at}" for step in self.steps
        )


def schedule(seed: int) -> Schedule:
    """The schedule of a seed, always the same."""
    generator = random.Random(seed)
    (where,) = generator.choices([*WHERE], [*WHERE.values()])
    places = sorted(generator.sample(range(1, SHARDS - 1), generator.randint(1, 3)))
    whats = generator.choices([*STRIKES[where]], k=len(places))
    steps = tuple(Step(at, what) for at, what in zip(places, whats, strict=True))
    return Schedule(seed, where, steps, generator.random() < 0.5)


class Course:
    """One schedule under way."""

    def __init__(self, world: World, plan: Schedule) -> None:
        self.world, self.plan = world, plan
        self.random = random.Random(plan.seed + 1)
        self.poisoned = False
        self.clock_s = 0.0
        self.tries = 0

    def run(self) -> str:
        """Carry it out; returns the outcome."""
        for step in self.plan.steps:
            self.reach(step.at)
            self.world.starts += 1
            STRIKES[self.plan.where][step.what](self)
        self.world.let_go()
        if self.world.proxy is not None:
            self.world.proxy.heal()
        if self.world.begun is not None and self.drives():
            wait_for(lambda: not self.drives(), f"end of {self.plan}")
        return self.bring_to_end()

    def drives(self) -> bool:
        """Whether a driver is at work. A damaged lease says nothing: ask for the process."""
        world = self.world
        assert world.begun is not None
        if self.plan.where != "ray":
            return world.begun.runs
        return live_holder(world.run.files) is not None

    def reach(self, at: int) -> None:
        """Have a driver that is held at a shard."""
        world = self.world
        world.hold(at)
        for _ in range(CURES):
            if world.begun is None:
                world.begun = world.submit(clock_s=self.clock_s)
            elif not self.drives():
                self.world.starts += 1
                cure(world, world.begun.told())
                world.begun = world.start("resume", world.id, *world.how, clock_s=self.clock_s)
            wait_for(lambda: self.is_held(at) or self.is_over(), f"hold at {at} of {self.plan}")
            if self.is_held(at):
                with contextlib.suppress(StoreError):  # a damaged record, which a command will tell
                    world.before = world.done()
                return
        raise AssertionError((str(self.plan), world.begun and world.begun.told()))

    def is_over(self) -> bool:
        """Whether neither a client nor a driver is at work."""
        return self.world.begun is not None and not (self.world.begun.runs or self.drives())

    def is_held(self, at: int) -> bool:
        world = self.world
        if world.begun is None or not (world.begun.runs or self.plan.where == "ray"):
            return False
        return world.state_of(at) == "running" or (
            # Its record was damaged, or its sample is poisoned; the next one is held.
            world.state_of(at + 1) == "running"
        )

    def bring_to_end(self) -> str:
        world = self.world
        if self.poisoned and self.plan.cured:
            world.cure()
        incomplete = self.poisoned and not self.plan.cured
        for _ in range(CURES + 2):
            told = world.infl("resume", world.id, *world.how)
            world.starts += 1
            cure(world, told)
            check = world.infl("verify", world.id)
            if "--repair" in check.err:
                cure(world, world.infl("verify", world.id, "--repair"))
            elif incomplete and f"1 of {SHARDS} shards failed" in told.err and check.code == 0:
                return world.check_incomplete()
            elif told.code == 0 and check.code == 0:
                world.check()
                return RIGHT
        raise AssertionError((str(self.plan), told, check))

    # -- strikes ----------------------------------------------------------------------------------

    def end(self, how: signal.Signals) -> None:
        assert self.world.begun is not None
        self.world.begun.kill(how)
        self.world.begun.told()

    def hang(self) -> None:
        assert self.world.begun is not None
        self.world.begun.kill(signal.SIGSTOP)
        told = self.world.infl("stop", self.world.id)
        # A strike before took what the process is known by: the lease, or the request.
        lost = ("is damaged", "is not running", "is not a readable spec")
        if any(words in told.err for words in lost):
            self.world.begun.kill()
        else:
            assert "is stopped" in told.err, told
        self.world.begun.told()

    def second_driver(self) -> None:
        told = self.world.infl("resume", self.world.id, *self.world.how)
        assert told.code == 2, told
        assert "another process is writing" in told.err or "damaged" in told.err, told

    def finished(self, count: int) -> list[int]:
        done = [int(name[:9]) // ROWS for name in self.world.before]
        return self.random.sample(done, min(count, len(done)))

    def damage_chunk(self, damage: Callable[[Path], object]) -> None:
        for shard in self.finished(1):
            path = chunk(self.world, shard)
            if path.exists() and path.stat().st_size:
                damage(path)
                self.world.touched.add(shard_id(shard))

    def swap_chunks(self) -> None:
        shards = self.finished(2)
        paths = [chunk(self.world, shard) for shard in shards]
        if len(paths) == 2 and all(path.exists() for path in paths):
            first, other = (path.read_bytes() for path in paths)
            paths[0].write_bytes(other)
            paths[1].write_bytes(first)
            self.world.touched |= {shard_id(shard) for shard in shards}

    def damage_file(self, damage: str) -> None:
        records = [f"manifest/{shard_id(shard)}.json" for shard in range(SHARDS - 1)]
        name = self.random.choice([*FILES, self.random.choice(records)])
        path, change = self.world.path / name, OF_FILES[damage]
        # Such damage may cost what is finished, but no more than a computation of it.
        self.world.touched |= {*self.world.before}
        with contextlib.suppress(FileNotFoundError):
            if change is None:
                path.unlink()
            else:
                path.write_bytes(change(path.read_bytes()))

    def poison(self) -> None:
        if not self.poisoned:
            what = self.random.choice(["nan", "inf", "raises", "memory"])
            self.world.poison(**{f"s{(SHARDS - 1) * ROWS + 9}": what})
            self.poisoned = True

    def shift_clock(self) -> None:
        self.end(signal.SIGKILL)
        self.clock_s = self.random.choice([3600.0, -3600.0, 25.0])

    def disturb_store(self) -> None:
        whats = (REFUSED, LOST, FAILED, CUT)
        self.world.proxy.disturb(at_random(self.random.uniform(0.05, 0.3), whats, self.plan.seed))

    def dead_store(self) -> None:
        until = time.monotonic() + self.random.uniform(1, 5)
        self.world.proxy.disturb(lambda *_: REFUSED if time.monotonic() < until else SERVED)

    def kill_workers(self, count: int) -> None:
        strike(wait_for(lambda: workers(self.world), "workers")[:count], signal.SIGKILL)

    def end_driver(self, how: signal.Signals) -> None:
        found = driver(self.world)
        strike(found, how)
        wait_for(lambda: not self.drives(), "end of the driver", PATIENCE_S)

    def kill_client(self) -> None:
        assert self.world.begun is not None
        self.world.begun.kill()

    def stop(self) -> None:
        assert "is stopped" in self.world.infl("stop", self.world.id).err


Strike = Callable[[Course], None]
_PROCESS: dict[str, Strike] = {
    "SIGKILL": lambda course: course.end(signal.SIGKILL),
    "SIGTERM": lambda course: course.end(signal.SIGTERM),
    "Ctrl-C": lambda course: course.end(signal.SIGINT),
    "wrong clock": Course.shift_clock,
    "poisoned sample": Course.poison,
}
STRIKES: dict[str, dict[str, Strike]] = {
    "local": {
        **_PROCESS,
        "SIGSTOP": Course.hang,
        "second driver": Course.second_driver,
        "chunks swapped": Course.swap_chunks,
        **{f"chunk {name}": partial(Course.damage_chunk, damage=damage)
           for name, (_, damage) in OF_CHUNKS.items()},
        **{f"file {name}": partial(Course.damage_file, damage=name) for name in OF_FILES},
    },
    "s3": {
        **_PROCESS,
        "second driver": Course.second_driver,
        "disturbed store": Course.disturb_store,
        "dead store": Course.dead_store,
    },
    "ray": {
        "worker killed": lambda course: course.kill_workers(1),
        "all workers killed": lambda course: course.kill_workers(2),
        "driver killed": lambda course: course.end_driver(signal.SIGKILL),
        "driver terminated": lambda course: course.end_driver(signal.SIGTERM),
        "client killed": Course.kill_client,
        "stopped by the user": Course.stop,
        "poisoned sample": Course.poison,
    },
}  # fmt: skip
