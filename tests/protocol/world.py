"""A world in which the project's own driver, lease and manifest run step by step.

Each driver is a process with a heartbeat. It stops before every operation on files, and a search
decides what happens next: a step of one of them, a crash, a lost answer, an error, a power cut, a
pause, or the next second. `explore` tries every order, and forgets none but those that lead to a
state that it has seen. Nothing here knows the protocol; what must hold is in `check`.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import greenlet

from infl_cluster import driver as driver_module
from infl_cluster.plans import settled_plan
from influence_jobs.errors import InflError
from influence_jobs.specs.base import AnySpec
from influence_jobs.store import layout
from influence_jobs.store.lease import BEAT_S, TTL_S, Lease, LeaseHeld
from influence_jobs.store.manifest import Manifest, checksum
from influence_jobs.store.status import is_done

from .stand_ins import (
    DONE,
    WORK_S,
    Backend,
    FakeJob,
    FakeRun,
    Files,
    Plain,
    Silent,
    patched,
    shards_of,
)

START = 1e9  # a time of day
ASK_AGAIN_S = 11.0  # a driver that is refused asks again
TRIES = 12
MOST_STEPS = 2000


class Broken(AssertionError):
    """Something that must hold does not. `trace` says how it came to that."""

    trace: Sequence[str] = ()


@dataclass(frozen=True)
class Scenario:
    """Who takes part, and how much may go wrong.

    Attributes:
        hosts: Host of each driver; those on one host see each other's processes.
        shards: Number of shards of the run; 0: the lease alone is held for a while.
        objects: Whether files lie in an object store, which may lose an answer.
        skews: By how many seconds each driver's clock is ahead.
        crashes, lost, errors, cuts, pauses: How many may happen. A pause stops everyone in the
            middle of whatever they do for longer than a lease lasts.
        late: Whether drivers may begin at any time, or all at once.
        stranger: Owner of a lease that is there already, of a driver that died; empty for none.
    """

    hosts: tuple[str, ...]
    shards: int = 0
    objects: bool = False
    skews: tuple[float, ...] = ()
    crashes: int = 0
    lost: int = 0
    errors: int = 0
    cuts: int = 0
    pauses: int = 0
    late: bool = True
    stranger: str = ""


@dataclass
class Thread:
    """One line of execution of a process: the driver, or its heartbeat."""

    of: "Process"
    run: Any
    wants: str = "start"
    until: Callable[[], bool] | None = None  # None: it may go on at once
    wakes: float | None = None
    ended: bool = False


@dataclass
class Process:
    """A driver.

    Attributes:
        seen: Hash of all that it has seen so far, which is its state.
        holds: Whether it believes to hold the lease.
    """

    name: str
    host: str
    skew: float
    alive: bool = True
    outcome: str = ""
    holds: bool = False
    seen: int = 0
    owners: int = 0
    threads: list[Thread] = field(default_factory=list)
    lease: Any = None


class World:
    """The files, the clock and the processes of one history."""

    def __init__(self, scenario: Scenario, spec: AnySpec):
        self.scenario, self.spec = scenario, spec
        self.now = START
        self.files: dict[str, bytes] = {}
        self.durable: dict[str, bytes] = {}
        self.left = {
            name: getattr(scenario, name)
            for name in ("crashes", "lost", "errors", "cuts", "pauses")
        }
        self.over = False
        self.computed: dict[str, int] = {}
        if scenario.stranger:
            holder = {"owner": scenario.stranger, "host": "gone", "pid": 1, "process_started": 0.0}
            text = json.dumps({**holder, "beat": START - TTL_S - 1}).encode()
            self.files[layout.LEASE] = self.durable[layout.LEASE] = text
        skews = scenario.skews or (0.0,) * len(scenario.hosts)
        self.processes = [
            Process(f"driver{i}", host, skew)
            for i, (host, skew) in enumerate(zip(scenario.hosts, skews, strict=True))
        ]
        for process in self.processes:
            self.spawn(process, partial(self.drives, process))

    # -- processes --------------------------------------------------------------------------------

    def spawn(self, process: Process, target: Callable[[], object]) -> Thread:
        thread = Thread(process, None)
        thread.run = greenlet.greenlet(target)
        process.threads.append(thread)
        return thread

    def me(self) -> Thread:
        current = greenlet.getcurrent()
        return next(t for p in self.processes for t in p.threads if t.run is current)

    def pause(
        self, wants: str, until: Callable[[], bool] | None = None, wakes: float | None = None
    ) -> str:
        """Let the search decide when this thread goes on; returns how."""
        thread = self.me()
        thread.wants, thread.until, thread.wakes = wants, until, wakes
        how: str = thread.run.parent.switch()
        if self.over:
            raise greenlet.GreenletExit
        thread.until = thread.wakes = None
        return how

    def note(self, what: object) -> None:
        process = self.me().of
        process.seen = hash((process.seen, repr(what)))

    def sleep(self, seconds: float) -> None:
        wakes = self.now + seconds
        self.pause(f"sleep {seconds:g}", lambda: self.now >= wakes, wakes)

    def drives(self, process: Process) -> None:
        files: Any = Files(self)
        for _ in range(TRIES):
            try:
                if self.scenario.shards == 0:
                    with Lease(files) as process.lease:
                        process.holds = True
                        self.sleep(WORK_S)
                        process.holds = False
                else:
                    self.carry_out(process, files)
                process.outcome = "done"
                return
            except LeaseHeld:
                self.sleep(ASK_AGAIN_S)
            except (InflError, OSError) as error:
                process.outcome = f"failed: {error}"
                return
            finally:
                process.holds = False
        process.outcome = "gave up"

    def carry_out(self, process: Process, files: Any) -> None:
        """What `driver.drive` does, without a task, a log and a status every second."""
        run = FakeRun(self, files)
        if is_done(run):
            return
        job = FakeJob(self, run)
        with Lease(files) as process.lease:
            process.holds = True
            if is_done(run):
                return
            run.manifest.drop_summary()
            plan = settled_plan(job, None, 1, automatic=False)  # type: ignore[arg-type]
            backend, status = Backend(self), Silent()
            driver_module._work(run, job, plan, backend, status, process.lease)  # type: ignore[arg-type]
            driver_module._finish(run, job)  # type: ignore[arg-type]
            run.write_json(layout.STATUS, DONE)
            process.holds = False

    # -- what may happen next ---------------------------------------------------------------------

    def options(self) -> list[tuple[str, ...]]:
        """Everything that may happen now, steps first."""
        found: list[tuple[str, ...]] = []
        ready = [
            (p, i, t)
            for p in self.processes
            if p.alive
            for i, t in enumerate(p.threads)
            if not t.ended and (t.until is None or t.until())
        ]
        for process, i, thread in ready:
            at = (process.name, str(i), thread.wants)
            found.append(("step", *at))
            word = thread.wants.split()[0]
            if word == "create" and self.left["lost"]:
                found.append(("lost", *at))
            if word in ("create", "write", "delete") and self.left["errors"]:
                found += [("error before", *at), ("error after", *at)]
        wakes = [t.wakes for p in self.processes if p.alive for t in p.threads if t.wakes]
        late = self.scenario.late
        if wakes and all(late and t.wants == "start" and i == 0 for _, i, t in ready):
            found.append(("wait until", str(min(wakes))))
        active = [p for p in self.processes if p.alive and not p.outcome]
        if self.left["crashes"]:
            found += [("crash", p.name) for p in active]
        if active and self.left["cuts"]:
            found += [("power cut", kept) for kept in ("nothing", "all", "empty files")]
        if active and ready and self.left["pauses"]:
            found.append(("pause",))
        return found

    def do(self, option: tuple[str, ...]) -> None:
        """Let it happen, and check what must hold."""
        kind = option[0]
        if kind == "wait until":
            self.now = float(option[1])
        elif kind == "pause":
            self.left["pauses"] -= 1
            self.now += TTL_S + BEAT_S
        elif kind == "crash":
            self.left["crashes"] -= 1
            self.end(next(p for p in self.processes if p.name == option[1]))
        elif kind == "power cut":
            self.left["cuts"] -= 1
            for process in self.processes:
                self.end(process)
            self.cut_power(option[1])
        else:
            if kind != "step":
                self.left["lost" if kind == "lost" else "errors"] -= 1
            process = next(p for p in self.processes if p.name == option[1])
            thread = process.threads[int(option[2])]
            thread.run.parent = greenlet.getcurrent()
            thread.run.switch(*() if thread.wants == "start" else (kind,))
            thread.ended = thread.run.dead
        self.check()

    def end(self, process: Process) -> None:
        process.alive = process.holds = False
        process.outcome = process.outcome or "crashed"

    def cut_power(self, kept: str) -> None:
        for name in {*self.files, *self.durable}:
            if self.files.get(name) == self.durable.get(name):
                continue
            if kept == "nothing" and name in self.durable:
                self.files[name] = self.durable[name]
            elif kept == "nothing":
                del self.files[name]
            elif kept == "empty files" and name in self.files:
                self.files[name] = b""
        self.durable = dict(self.files)

    def state(self) -> int:
        """Hash of all that decides what may still happen."""
        processes = tuple(
            (p.alive, p.seen, p.outcome, p.holds, *((t.wants, t.ended, t.wakes) for t in p.threads))
            for p in self.processes
        )
        files = tuple(sorted(self.files.items())), tuple(sorted(self.durable.items()))
        return hash((self.now, processes, files, tuple(self.left.items())))

    def close(self) -> None:
        """End all threads that are left."""
        self.over = True
        for thread in (t for p in self.processes for t in p.threads):
            if thread.run and not thread.run.dead:
                thread.run.parent = greenlet.getcurrent()
                thread.run.throw()

    # -- what must hold ---------------------------------------------------------------------------

    def check(self) -> None:
        """Check what must hold in every state."""
        holders = [p.name for p in self.processes if p.holds and not p.lease.lost.is_set()]
        if len(holders) > 1 and not self.scenario.pauses:
            raise Broken(f"{' and '.join(holders)} hold the lease at the same time")
        for where, files in (("", self.files), ("after a power cut, ", self.durable)):
            for name, text in files.items():
                if name.startswith(layout.MANIFEST) and text:
                    self.check_entry(where, json.loads(text), files)

    def check_entry(self, where: str, entry: dict[str, Any], files: dict[str, bytes]) -> None:
        if entry["state"] != "done":
            return
        for array, expected in entry["arrays"].items():
            if checksum(files.get(f"data/{array}/{entry['start']}", b"")) != expected:
                raise Broken(f"{where}shard {entry['shard']} is done, and its data are not there")

    def check_end(self) -> None:
        """Nobody moves any more: whoever comes now ends the run."""
        stuck = [p.name for p in self.processes if p.outcome == "gave up"]
        if stuck:
            raise Broken(f"{stuck[0]} waits for ever")
        faultless = self.left == {name: getattr(self.scenario, name) for name in self.left}
        failed = [p.outcome for p in self.processes if p.outcome.startswith("failed")]
        if faultless and failed:
            raise Broken(f"without any fault a driver {failed[0]}")
        if faultless and any(count > 1 for count in self.computed.values()):
            raise Broken("without any fault a shard was computed twice")
        self.left = dict.fromkeys(self.left, 0)
        self.now += 2 * TTL_S
        last = Process("next", "elsewhere", 0.0)
        self.processes.append(last)
        self.spawn(last, lambda: self.drives(last))
        for _ in range(MOST_STEPS):
            options = self.options()
            if not options:
                break
            self.do(options[0])
        if last.outcome != "done":
            raise Broken(f"the next driver {last.outcome or 'waits for ever'}")
        if self.scenario.shards == 0:
            if self.files and faultless:
                raise Broken(f"left behind: {', '.join(self.files)}")
            return
        run = FakeRun(self, self)
        plain: Any = Plain(self.files)
        manifest = Manifest(plain)
        done = manifest.done()
        wanted = {*(shard.id for shard in shards_of(self.scenario.shards)), layout.FINISH}
        if {*done} != wanted:
            raise Broken(f"done are {sorted(done)}")
        if manifest.summary() != manifest._summed():
            raise Broken("the summary says something else than the entries")
        for shard in shards_of(self.scenario.shards):
            if self.files[f"data/numbers/{shard.start}"] != run.right(shard.start):
                raise Broken(f"shard {shard.id} has other bytes")


_Path = tuple[Any, tuple[str, ...]]  # the path before, and what happens then


def _options(path: _Path | None) -> list[tuple[str, ...]]:
    found = []
    while path is not None:
        path, option = path
        found.append(option)
    return found[::-1]


def explore(
    scenario: Scenario, spec: AnySpec, *, most: int = 10**9, rng: random.Random | None = None
) -> tuple[int, int]:
    """Try every history of a scenario; or, of one that is too large, some drawn at random.

    Returns:
        The number of states, and of histories followed to a state that was seen or to the end.

    Raises:
        Broken: Something that must hold does not.
    """
    seen: set[int] = set()
    todo: list[_Path | None] = [None]
    histories = 0
    while todo and len(seen) < most:
        path = todo.pop(rng.randrange(len(todo)) if rng else -1)
        histories += 1
        with patched() as bind:
            world = World(scenario, spec)
            bind(world)
            try:
                for option in _options(path):
                    world.do(option)
                for _ in range(MOST_STEPS):
                    state = world.state()
                    if state in seen:
                        break
                    seen.add(state)
                    options = world.options()
                    if not options:
                        world.check_end()
                        break
                    todo += [(path, option) for option in options[1:]]
                    path = (path, options[0])
                    world.do(options[0])
                else:
                    raise Broken("it never ends")
            except Broken as broken:
                broken.trace = [" ".join(option) for option in _options(path)]
                raise
            finally:
                world.close()
    return len(seen), histories
