"""Workers that refuse a run, without Ray: when they are asked again, and what is said meanwhile."""

from contextlib import nullcontext

import pytest
import ray

from infl_cluster import actors as module
from infl_cluster.actors import REFUSED_S, Actors
from influence_jobs.errors import RuntimeFault
from influence_jobs.gpu import UNUSABLE
from influence_jobs.jobs.base import Receipt, Shard


class Actor:
    """Answers `begin` with a refusal, or takes shards."""

    def __init__(self, refusal=None):
        self.refusal, self.begin, self.run = refusal, self, self

    def options(self, **_):
        return self

    def remote(self, *shard):
        return ("ran", self, *shard) if shard else ("began", self)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()

    def get(reference):
        if reference[0] == "ran":
            return Receipt(reference[2].id, "done")
        return reference[1].refusal, "host:1", "cpu"

    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(ray, "wait", lambda references, **_: (references[:1], references[1:]))
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    return clock


def test_a_refusal_is_forgotten_and_the_node_asked_again(clock):
    there, started = {"data": False}, []

    def start():
        ok = not started or there["data"]
        started.append(Actor(None if ok else "no data here"))
        return started[-1]

    actors = Actors(start, "test", 1800.0)
    actors.grow(1)
    actors.wait(0)
    actors.give(actors.idle[0], Shard("a", 0, 1))
    actors.wait(0)  # a shard is done: who refuses now is gone on without
    actors.grow(2)
    actors.wait(0)
    said = "a worker could not start, and the run goes on without it for a while: no data here"
    assert actors.refusal == said
    actors.grow(2)
    assert len(started) == 2
    there["data"] = True
    clock.now += REFUSED_S + 1
    actors.grow(2)
    assert len(started) == 3
    assert actors.refusal is None
    actors.wait(0)
    assert len(actors.idle) == 2


def test_a_refusal_is_forgotten_once_no_worker_is_left(clock):
    started = []

    def start():
        started.append(Actor("no data here" if len(started) == 1 else None))
        return started[-1]

    actors = Actors(start, "test", 1800.0)
    actors.grow(1)
    actors.wait(0)
    actors.give(actors.idle[0], Shard("a", 0, 1))
    actors.wait(0)
    actors.grow(2)
    actors.wait(0)
    assert actors.refusal
    actors.end(actors.idle[0])
    actors.grow(2)
    assert actors.refusal is None


@pytest.mark.parametrize("broken", [(0,), (2,), (0, 1), (0, 1, 2)])
def test_a_run_begins_without_the_gpus_that_are_broken_unless_all_are(clock, broken):
    refusal, started = f"on node a: {UNUSABLE} (CUDA error)", []

    def start():
        started.append(Actor(refusal if len(started) in broken else None))
        return started[-1]

    actors = Actors(start, "test", 1800.0)
    actors.grow(3)
    if len(broken) == 3:
        actors.wait(0)
        actors.wait(0)
        with pytest.raises(RuntimeFault, match=UNUSABLE):
            actors.wait(0)
        return
    for _ in range(3):
        actors.wait(0)
    assert len(actors.idle) == 3 - len(broken)
    assert refusal in actors.refusal
    actors.grow(3)
    assert len(started) == 3  # they are asked again only after a while


def test_another_refusal_ends_a_run_that_has_done_nothing(clock):
    actors = Actors(lambda: Actor("no data here"), "test", 1800.0)
    actors.grow(2)
    with pytest.raises(RuntimeFault, match="no data here"):
        actors.wait(0)


def of_gpu_that_fails(reference):
    if reference[0] == "ran":
        return Receipt(reference[2].id, "failed", "CUDA error", "worker")
    return None, "host:1", "cuda"


def test_a_gpu_that_fails_under_load_leaves_its_shard_to_the_others(clock, monkeypatch):
    """It passes what it is asked at the start; three failures of a shard would end the run."""
    started = []

    def start():
        started.append(Actor())
        return started[-1]

    monkeypatch.setattr(ray, "get", of_gpu_that_fails)
    actors = Actors(start, "test", 1800.0)
    actors.grow(2)
    actors.wait(0)
    actors.wait(0)
    broken, other = actors.idle
    actors.give(broken, Shard("a", 0, 1))
    assert actors.wait(0)[1].kind == "worker"
    actors.end(broken)
    said = "a GPU failed, and the run goes on without it for a while: CUDA error"
    assert actors.refusal == said
    actors.grow(2)
    assert (len(started), actors.idle) == (2, [other])
    clock.now += REFUSED_S + 1
    actors.grow(2)  # it may have been reset
    assert len(started) == 3


def test_the_only_gpu_that_fails_is_asked_again_at_once(clock, monkeypatch):
    monkeypatch.setattr(ray, "get", of_gpu_that_fails)
    actors = Actors(Actor, "test", 1800.0)
    actors.grow(1)
    actors.wait(0)
    actors.give(actors.idle[0], Shard("a", 0, 1))
    actors.wait(0)
    actors.end(actors.idle[0])
    actors.grow(1)
    actors.wait(0)
    assert len(actors.idle) == 1


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("RpcError: Socket closed rpc_code: 14", "its node was lost, or it crashed or was killed"),
        ("Worker exit detail: Worker unexpectedly exits: EOF", "it crashed or was killed"),
        ("The actor died because its node has died. Node Id: 7f", "its node was lost"),
        (
            "Worker exit detail: Task was killed due to the node running low on memory.",
            "its machine killed it for lack of memory; resume with fewer --workers",
        ),
    ],
)
def test_a_worker_that_is_gone_is_told_in_our_words(clock, monkeypatch, caplog, said, told):
    actors = Actors(Actor, "test", 1800.0)
    actors.grow(1)
    actors.wait(0)
    actors.give(actors.idle[0], Shard("a", 0, 1))

    def get(_):
        raise ray.exceptions.ActorUnavailableError(said, None)

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "nodes", lambda: [{}, {}])
    _, receipt = actors.wait(0)
    assert (receipt.status, receipt.kind) == ("failed", "transient")
    assert receipt.error.startswith(f"worker process host:1 is gone: {told}")
    assert "actor" not in receipt.error
    assert "worker process host:1: Ray says: " in caplog.text  # for who looks into Ray
    assert actors.idle == []


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        ("The actor died because its node has died. The actor never ran", False),
        ("Worker exit detail: Worker unexpectedly exits: EOF", True),
    ],
)
def test_workers_that_go_down_with_their_node_do_not_end_a_run(clock, monkeypatch, said, ends):
    actors = Actors(Actor, "test", 1800.0)

    def get(_):
        raise ray.exceptions.ActorUnavailableError(said, None)

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "nodes", lambda: [{}, {}])
    with pytest.raises(RuntimeFault, match="die while starting") if ends else nullcontext():
        for _ in range(5):
            actors.grow(2)
            actors.wait(0)
    assert not actors.idle
