"""Faults of a run on Ray: of its workers, its driver, the client, and each process of Ray."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

import psutil
from faults_base import HELD, Fault, World, wait_for
from faults_local import RESUMED, little_memory

from infl_cluster.head import Head, head_processes, recorded_head
from influence_jobs.store.lease import holder_of

GOES_ON = "the run goes on by itself; at most the shards of the dead are computed again"
NEW_HEAD = (
    "the run fails with the cause, or is interrupted, but not `stopped`; nothing of the old Ray is "
    "left, and `infl resume` starts a new one and ends the run"
)
SILENT_S = 60.0  # a stopped or hung worker is told within this time

Find = Callable[[World], list[psutil.Process]]


def the_head() -> Head:
    head = recorded_head()
    assert head is not None
    return head


def of_head() -> list[psutil.Process]:
    head = the_head()
    return head_processes(head.pid, head.create_time, head.temp_dir)


def named(*words: str) -> list[psutil.Process]:
    """Processes of the head whose command line has one of some words."""
    found = []
    for process in of_head():
        try:
            line = " ".join(process.cmdline()[:4])
        except psutil.Error:
            continue
        if any(word in line for word in words):
            found.append(process)
    return found


def workers(_world: World) -> list[psutil.Process]:
    return named("ray::ShardWorker", "ray::grad-norms")  # its title is the task under way


def driver(world: World) -> list[psutil.Process]:
    holder = holder_of(world.run.files)
    assert holder is not None
    return [psutil.Process(holder["pid"])]


def supervisor(_world: World) -> list[psutil.Process]:
    return [psutil.Process(the_head().pid)]


def everything(world: World) -> list[psutil.Process]:
    return [*of_head(), *driver(world)]


VICTIMS: dict[str, Find] = {
    "GCS": lambda _world: named("gcs_server"),
    "raylet": lambda _world: named("raylet/raylet"),
    "agent": lambda _world: named("ray::DashboardAgent"),
    "dashboard": lambda _world: named("dashboard/dashboard.py"),
    "supervisor": supervisor,
}


def begin(world: World) -> None:
    """Start a run and wait until both workers have a shard that waits."""
    world.begin()
    wait_for(lambda: world.state_of(HELD + 1) == "running", "second worker")
    assert len(workers(world)) == 2
    world.before = world.done()


def strike(processes: list[psutil.Process], how: signal.Signals) -> None:
    assert processes
    for process in processes:
        if process.is_running():
            os.kill(process.pid, how)


def ends_well(world: World) -> str:
    world.let_go()
    assert world.begun is not None
    told = world.begun.told()
    assert told.code == 0, told
    return world.check()


# -- workers --------------------------------------------------------------------------------------


def workers_end(world: World, count: int, how: signal.Signals) -> str:
    begin(world)
    strike(workers(world)[:count], how)
    return ends_well(world)


def storm(world: World) -> str:
    """Each new worker is killed while it has a shard, until shards have no attempt left."""
    begin(world)
    seen: set[int] = set()
    while world.begun is not None and world.begun.runs and len(seen) < 30:
        for worker in workers(world):
            time.sleep(0.2)
            seen.add(worker.pid)
            strike([worker], signal.SIGKILL)
    world.let_go()
    assert world.begun is not None
    told = world.begun.told()
    assert told.code == 2
    world.says(told, "worker", "die")
    world.starts = 4
    world.resume()
    return world.check()


def worker_stopped(world: World) -> str:
    """The other worker has nothing else to do in the end."""
    begin(world)
    victim = workers(world)[0]
    strike([victim], signal.SIGSTOP)
    world.let_go()
    outcome = ends_well(world)
    log = world.infl("logs", world.id)
    world.says(log, "has taken", f":{victim.pid}: process", "the first to finish wins")
    wait_for(lambda: not victim.is_running(), "end of the stopped worker")
    assert (world.status()["backups"], world.status()["backups_won"]) == (1, 1)
    return outcome


def workers_stopped(world: World) -> str:
    """Nobody is left to take over."""
    world.how += ("--stalled-after", "15")
    begin(world)
    victims = workers(world)
    strike(victims, signal.SIGSTOP)
    outcome = ends_well(world)
    assert not any(victim.is_running() for victim in victims)
    assert world.status()["stalled"] == 2
    world.says(world.infl("logs", world.id), "no progress for", "which was ended")
    return outcome


def worker_hangs(world: World) -> str:
    """As in a read that never returns: the process lives, and computes nothing."""
    begin(world)
    told = wait_for(lambda: world.status()["message"], "word of the hung workers", SILENT_S)
    world.says(told, "no progress in shard", "and in 1 more", "a long step, or it hangs")
    return ends_well(world)


def worker_out_of_memory(world: World) -> str:
    begin(world)
    world.poison(**{f"s{HELD * 256 + 5}": "eats", f"s{(HELD + 1) * 256 + 5}": "eats"})
    victims = workers(world)
    with little_memory(victims[0].pid), little_memory(victims[1].pid):
        outcome = ends_well(world)
    world.says(world.infl("logs", world.id), "its machine killed it for lack of memory")
    return outcome


def sample_kills_workers(world: World) -> str:
    world.poison(**{f"s{5 * 256 + 7}": "kills"})
    told = world.submit().told()
    assert told.code == 2
    world.says(told, "1 of 8 shards failed", "worker process", "is gone")
    world.before = world.done()
    outcome = world.check_incomplete()
    world.cure()
    world.starts = 4  # three attempts, and one after the cure
    world.resume()
    world.check()
    return outcome


# -- client and driver ----------------------------------------------------------------------------


def client_gone(world: World, how: signal.Signals) -> str:
    begin(world)
    assert world.begun is not None
    world.begun.kill(how)
    told = world.begun.told()
    if how is signal.SIGINT:
        assert told.code == 130
        world.says(told, "goes on in the background", "infl stop")
    world.let_go()
    wait_for(lambda: world.status()["state"] == "done", "end of the run")
    world.starts = 1
    return world.check()


def driver_ends(world: World, how: signal.Signals, state: str) -> str:
    begin(world)
    strike(driver(world), how)
    assert world.begun is not None
    assert world.begun.told().code == 2
    world.let_go()
    assert world.status()["state"] == state
    world.resume()
    return world.check()


def driver_stopped(world: World) -> str:
    begin(world)
    strike(driver(world), signal.SIGSTOP)
    told = wait_for(lambda: world.status()["message"], "word of the hung driver", SILENT_S)
    world.says(told, "does not respond", "infl stop")
    world.says(world.infl("stop", world.id), "is stopped")
    world.let_go()
    world.resume()
    return world.check()


def stopped_by_the_user(world: World) -> str:
    begin(world)
    world.says(world.infl("stop", world.id), "is stopped; go on with: infl resume")
    world.let_go()
    assert world.status()["state"] == "stopped"
    world.resume()
    return world.check()


# -- Ray ------------------------------------------------------------------------------------------


def part_of_ray_ends(world: World, victim: Find, how: signal.Signals) -> str:
    begin(world)
    old = the_head()
    strike(victim(world), how)
    assert world.begun is not None
    told = world.begun.told()
    assert told.code == 2
    wait_for(lambda: not head_processes(old.pid, old.create_time, old.temp_dir), "end of Ray")
    found = world.status()
    assert found["state"] in ("failed", "interrupted"), found
    if found["state"] == "failed":
        world.says(found["message"], "the Ray that computed it has died")
    assert json.loads(world.server_infl("cluster", "status", "--json").out)["left"] == []
    world.let_go()
    world.resume()
    assert the_head().pid != old.pid
    return world.check()


def part_of_ray_stops(world: World, victim: Find) -> str:
    """It is told or does no harm; `infl cluster down` ends it."""
    begin(world)
    old = the_head()
    strike(victim(world), signal.SIGSTOP)
    world.let_go()
    assert world.begun is not None
    wait_for(lambda: world.begun is None or not world.begun.runs or world.status().get("message"),
             "end or word of the run", 2 * SILENT_S)  # fmt: skip
    assert world.server_infl("cluster", "down").code == 0
    assert not head_processes(old.pid, old.create_time, old.temp_dir)
    world.begun.told()
    world.resume()
    return world.check()


def agent_dead_at_the_next_submit(world: World) -> str:
    """Ray's dashboard answers as before, and every job is refused."""
    begin(world)
    old = the_head()
    world.infl("stop", world.id)
    world.let_go()
    agents = VICTIMS["agent"](world)
    strike(agents, signal.SIGTERM)
    wait_for(lambda: not any(agent.is_running() for agent in agents), "end of the agent")
    world.resume()  # at once
    assert the_head().pid != old.pid
    assert not head_processes(old.pid, old.create_time, old.temp_dir)
    return world.check()


def ray_in_order(world: World) -> str:
    """`infl cluster down` asks the jobs to end first."""
    begin(world)
    assert world.server_infl("cluster", "down").code == 0
    world.let_go()
    assert world.begun is not None
    assert world.begun.told().code == 2
    assert world.status()["state"] == "stopped"
    world.resume()
    return world.check()


def faults() -> Iterator[Fault]:
    def on_ray(group: str, name: str, how: str, promise: str, inject: Callable[..., str]) -> Fault:
        return Fault(group, name, how, promise, inject, fixture="ray_world")

    killed, ended, stopped = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP
    for count, what in ((1, "one"), (2, "all")):
        for how in (killed, ended):
            name = f"{what} {'killed' if how is killed else 'terminated'}"
            yield on_ray("worker", name, how.name, GOES_ON,
                         partial(workers_end, count=count, how=how))  # fmt: skip
    yield on_ray("worker", "each one killed", "SIGKILL, 30 workers or until the run gives up",
                 "it gives up after three attempts of a shard and says so; " + RESUMED,
                 storm)  # fmt: skip
    told = "told within 60 seconds, with the process; once it is killed, the run goes on"
    yield on_ray("worker", "stopped", stopped.name,
                 "told, with the process; an idle worker takes its shard over",
                 worker_stopped)  # fmt: skip
    yield on_ray("worker", "all stopped", "SIGSTOP, with --stalled-after",
                 "told, with the processes; they are replaced",
                 workers_stopped)  # fmt: skip
    yield on_ray("worker", "hangs", "its loss does not return", told, worker_hangs)
    yield on_ray("worker", "out of memory", "a memory control group",
                 "said as such; " + GOES_ON, worker_out_of_memory)  # fmt: skip
    yield on_ray("worker", "killed by a sample", "SIGKILL within its loss",
                 "tried three times; all other shards are done, and the cause is said",
                 sample_kills_workers)  # fmt: skip
    yield on_ray("client", "killed", killed.name, "the run goes on",
                 partial(client_gone, how=killed))  # fmt: skip
    yield on_ray("client", "Ctrl-C", "SIGINT", "the run goes on, which is said",
                 partial(client_gone, how=signal.SIGINT))  # fmt: skip
    yield on_ray("driver on Ray", "killed", killed.name, RESUMED,
                 partial(driver_ends, how=killed, state="interrupted"))  # fmt: skip
    yield on_ray("driver on Ray", "terminated", ended.name, RESUMED,
                 partial(driver_ends, how=ended, state="stopped"))  # fmt: skip
    yield on_ray("driver on Ray", "stopped", stopped.name,
                 "said within 60 seconds; `infl stop` ends it; " + RESUMED,
                 driver_stopped)  # fmt: skip
    yield on_ray("driver on Ray", "stopped by the user", "`infl stop`", RESUMED,
                 stopped_by_the_user)  # fmt: skip
    for name, find in VICTIMS.items():
        yield on_ray("Ray", f"{name} killed", killed.name, NEW_HEAD,
                     partial(part_of_ray_ends, victim=find, how=killed))  # fmt: skip
        if name != "supervisor":
            yield on_ray("Ray", f"{name} terminated", ended.name, NEW_HEAD,
                         partial(part_of_ray_ends, victim=find, how=ended))  # fmt: skip
        yield on_ray("Ray", f"{name} stopped", stopped.name,
                     "the run ends, or the fault is told; `infl cluster down` ends this Ray",
                     partial(part_of_ray_stops, victim=find))  # fmt: skip
    yield on_ray("Ray", "everything killed", killed.name, NEW_HEAD,
                 partial(part_of_ray_ends, victim=everything, how=killed))  # fmt: skip
    yield on_ray("Ray", "agent dead at the next submit", ended.name,
                 "the submit starts a new Ray", agent_dead_at_the_next_submit)  # fmt: skip
    yield on_ray("Ray", "ended in order", "`infl cluster down`", RESUMED, ray_in_order)
