"""Faults of an object store: a proxy before a server that speaks S3, and its credentials."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from fault_proxy import (
    CUT,
    FAILED,
    LOST,
    REFUSED,
    SERVED,
    SLOW,
    at_random,
    every,
    first,
    one_of,
)  # fmt: skip
from faults_base import Fault, World, wait_for
from faults_ray import the_head

OUTLASTED = "the run outlasts it; no shard is lost or computed without need"
SECRET = "secret-that-nobody-may-see"


def disturbed(world: World, make: Any, starts: int = 1) -> str:
    """A run from its first request to its last."""
    world.proxy.disturb(make())
    told = world.submit().told()
    counts = world.proxy.counts
    world.proxy.heal()
    assert told.code == 0, told
    assert sum(count for what, count in counts.items() if what != SERVED) > 0, counts
    world.starts = starts
    return world.check()


def dead_for_a_while(world: World) -> str:
    """In the middle of the run, for longer than a command waits."""
    driver = world.begin()
    world.proxy.disturb(lambda *_: REFUSED)
    world.let_go()
    told = world.start("status", "grad").told()
    assert told.code == 2
    assert "Traceback" not in told.err
    world.says(told, "check the bucket's name")
    wait_for(lambda: world.proxy.counts.get(REFUSED, 0) > 20, "requests that are tried again")
    world.proxy.heal()
    assert driver.told().code == 0
    world.starts = 1
    return world.check()


def driver_killed(world: World) -> str:
    """Its lease names a dead process of this machine."""
    world.begin().kill()
    assert world.begun is not None
    world.begun.told()
    world.let_go()
    world.resume()
    return world.check()


def credentials_later(world: World) -> str:
    """Ray is started first, without them."""
    store = {name: world.env.pop(name) for name in [*world.env] if name.startswith("AWS_")}
    assert world.server_infl("cluster", "up").code == 0
    world.env |= store
    world.how = ("--workers", "2")
    world.complete()
    client = the_head().client()
    jobs = json.dumps(client._call("GET", "/api/jobs/"))
    assert world.id in jobs
    assert SECRET not in jobs
    world.starts = 1
    return world.check()


def no_credentials(world: World) -> str:
    for name in [*world.env]:
        if "KEY" in name:
            del world.env[name]
    told = world.start("runs").told()
    assert told.code == 2
    assert "169.254" not in told.err
    assert "Traceback" not in told.err
    world.says(told, "there are no credentials: set AWS_ACCESS_KEY_ID")
    return "refused, with the cure"


DISTURBANCES: tuple[tuple[str, str, Any, int], ...] = (
    ("the first eight requests are refused", "503", partial(first, 8, REFUSED), 1),
    ("every second request is refused", "503", partial(every, 2, REFUSED), 1),
    ("every third answer is lost", "connection closed after the write", partial(every, 3, LOST), 2),
    ("every third write is done and fails", "500 after the write",
     partial(every, 3, FAILED, "PUT"), 1),
    ("every fourth answer is cut", "half of the body", partial(every, 4, CUT, "GET"), 2),
    ("every fifth answer is late", "a second", partial(every, 5, SLOW), 1),
    ("the lease is written, the answer lost", "connection closed",
     partial(one_of, "/lease.json", "PUT", LOST), 1),
    ("the lease is written, the answer is an error", "500",
     partial(one_of, "/lease.json", "PUT", FAILED), 1),
    ("all of it at random", "a fifth of all requests",
     partial(at_random, 0.2, (REFUSED, LOST, FAILED, CUT), 7), 3),
)  # fmt: skip


def faults() -> Iterator[Fault]:
    def on_s3(name: str, how: str, promise: str, inject: Any, fixture: str = "s3_world") -> Fault:
        return Fault("object store", name, how, promise, inject, fixture=fixture)

    for name, how, make, starts in DISTURBANCES:
        yield on_s3(name, how, OUTLASTED, partial(disturbed, make=make, starts=starts))
    yield on_s3("nothing answers for a while", "503 to all", OUTLASTED, dead_for_a_while)
    yield on_s3("the driver is killed", "SIGKILL", "`infl resume` ends it", driver_killed)
    yield on_s3("no credentials", "none are set", "refused, with the cure", no_credentials)
    yield on_s3("credentials later than Ray", "set after `infl cluster up`",
                "a job has those of its submit, and no one sees them", credentials_later,
                "s3_ray_world")  # fmt: skip
