"""Which hosts do a run's shards, as its status tells it."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from infl_cluster import status as status_module
from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from infl_cluster.status import LATE_S, StatusWriter
from influence_jobs.errors import RuntimeFault
from influence_jobs.jobs.base import Plan, Receipt, Shard
from influence_jobs.kinds import missing_inputs
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.runner import this_process
from influence_jobs.store import layout
from influence_jobs.store.documents import Entry, Status
from influence_jobs.store.files import LocalFiles
from influence_jobs.store.run import Run
from influence_jobs.store.status import (
    named,
    progress_in_words,
    progress_line,
    rate_and_eta,
    read_status,
    submitted_again,
)

SHARDS = tuple(Shard(name, 100 * i, 100 * (i + 1)) for i, name in enumerate("abcdef"))


def done_by(shard: str, worker: str) -> Receipt:
    return Receipt(shard, "done", worker=worker)


def test_a_status_tells_which_node_did_which_part(
    tmp_path: Path, grad_norms_spec: GradNormsSpec
) -> None:
    run = Run.create(str(tmp_path), grad_norms_spec)
    earlier = {
        "a": Entry("a", 0, 100, attempt=1, spec="", state="done", worker="north:1"),
        "b": Entry("b", 100, 200, attempt=1, spec="", state="done"),  # by an earlier version
    }
    with StatusWriter(run) as status:
        status.planned(Plan((), SHARDS, units=600, batch_size=1), earlier)
        status.started("c", "north:2")
        status.started("d", "south:3")
        status.started("e", "south:4")
        status.left("c", "north:2")
        status.count(done_by("c", "north:2"), retried=False)
        status.left("d", "south:3")
        status.count(Receipt("d", "failed", "no"), retried=True)
        status.waits_for(None)
        said = progress_in_words(read_status(run))
        assert said["shards by node"] == "north 2"
        assert said["workers by node"] == "south 1"
        status.started("d", "north:2")
        status.started("e", "north:5")  # a backup: the first attempt wins
        status.waits_for(None)
        assert progress_in_words(read_status(run))["workers by node"] == "north 2, south 1"
        status.left("e", "north:5")
        status.waits_for(None)
        at_work = {host: at["at_work"] for host, at in read_status(run)["nodes"].items()}
        assert at_work == {"north": 1, "south": 1}
        status.left("e", "south:4")
        status.count(done_by("e", "south:4"), retried=False)
        status.left("d", "north:2")
        status.count(done_by("d", "north:2"), retried=False)
        status.again([SHARDS[2]])
    found = read_status(run)
    assert "shards computed again after two workers differed: 1" in progress_line(found)
    assert found["nodes"] == {
        "north": {"shards": 2, "at_work": 0},
        "south": {"shards": 1, "at_work": 0},
    }
    assert progress_in_words(found)["shards by node"] == "north 2, south 1"
    assert "workers by node" not in progress_in_words(found)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of the status, which the test moves."""
    found = SimpleNamespace(time=1000.0)
    monkeypatch.setattr(status_module, "time", SimpleNamespace(monotonic=lambda: found.time))
    monkeypatch.setattr(StatusWriter, "_beat", lambda self: None)  # the test looks itself
    return found


def test_both_workers_of_a_silent_shard_are_named(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, clock: SimpleNamespace
) -> None:
    run = Run.create(str(tmp_path), grad_norms_spec)
    with StatusWriter(run) as status:
        status.planned(Plan((), SHARDS, units=600, batch_size=1), {})
        status.started("a", "north:1")
        for _ in range(50):
            clock.time += 1.0
            status.waits_for(None)
        status.started("a", "south:2")
        status.waits_for(None)
        assert read_status(run)["message"] == (
            "no progress in shard a for 50 s: process 1, on north; process 2, on south"
        )


def test_the_time_of_an_outage_is_not_taken_for_that_of_workers(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, clock: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = Run.create(str(tmp_path), grad_norms_spec)
    names, up = LocalFiles.names, True

    def during(self: LocalFiles, folder: str) -> list[str]:
        if not up:
            raise OSError("no answer")
        return names(self, folder)

    monkeypatch.setattr(LocalFiles, "names", during)
    with StatusWriter(run) as status:
        status.planned(Plan((), SHARDS, units=600, batch_size=1), {})
        status.started("a", "north:1")
        for _ in range(10):
            clock.time += 1.0
            status.waits_for(None)
        assert status.quiet_s("a") == 10
        up = False
        for _ in range(600):
            clock.time += 1.0
            with pytest.raises(OSError, match="no answer"):
                status.waits_for(None)
            assert status.quiet_s("a") <= 10 + LATE_S
        up = True
        status.waits_for(None)
        assert (status.quiet_s("a"), read_status(run)["message"]) == (10 + LATE_S, None)
        for _ in range(60):  # it hangs
            clock.time += 1.0
            status.waits_for(None)
        assert status.quiet_s("a") == 70 + LATE_S
        assert "no progress in shard a" in str(read_status(run)["message"])


def test_a_run_that_is_submitted_again_keeps_what_is_done(
    tmp_path: Path, grad_norms_spec: GradNormsSpec
) -> None:
    run = Run.create(str(tmp_path), grad_norms_spec)
    plan = Plan((), SHARDS, units=600, batch_size=1)
    with pytest.raises(RuntimeFault), StatusWriter(run) as status:
        status.planned(plan, {})
        status.started("a", "north:1")
        status.left("a", "north:1")
        status.count(done_by("a", "north:1"), retried=False)
        status.count(Receipt("b", "failed", "no"), retried=True)
        raise RuntimeFault("no room")
    counts = {"shards_done": 1, "shards_total": 6, "units_done": 100, "units_total": 600}
    nodes = {"north": {"shards": 1, "at_work": 0}}
    last = read_status(run)
    run.write_json(layout.STATUS, submitted_again(cast(Status, last)))
    for state in ("new", "running"):
        found = read_status(run)
        assert found["state"] == state
        assert {name: found[name] for name in counts} == counts
        assert (found["nodes"], found["failures"], found["message"]) == (nodes, {}, None)
        assert rate_and_eta(found) is None
        assert progress_line(found) == "100 of 600 samples, shards 1 of 6"
        if state == "new":
            begun = StatusWriter(run).__enter__()  # its driver reads its data for a while
    done = Entry("a", 0, 100, attempt=1, spec="", state="done", worker="north:1")
    begun.planned(plan, {"a": done})
    begun.__exit__(None, None, None)
    assert {name: read_status(run)[name] for name in counts} == counts


def test_of_many_nodes_the_busiest_are_named() -> None:
    nodes = {f"host-{i}": {"shards": i, "at_work": 0} for i in range(12)}
    status = {"state": "done", "units_total": 1, "units_done": 1, "shards_done": 1}
    said = progress_in_words({**status, "shards_total": 1, "nodes": nodes})["shards by node"]
    assert said.startswith("host-11 11, host-10 10, ")
    assert said.endswith("host-4 4 and 3 more nodes")


def test_a_run_keeps_where_it_was_computed(tmp_path: Path, grad_norms_spec: GradNormsSpec) -> None:
    run = Run.create(str(tmp_path), grad_norms_spec)
    needs = [needed.id for needed in missing_inputs(run)]
    assert [name.partition("-")[0] for name in needs] == ["train"]
    drive(run.root, run.id, InlineBackend())
    found = read_status(run)
    plan = run.plan()
    assert plan is not None
    host = this_process().partition(":")[0]
    assert found["nodes"] == {host: {"shards": len(plan["shards"]), "at_work": 0}}
    assert found["needs"] == needs
    assert missing_inputs(run) == []


@pytest.mark.parametrize(
    ("run", "needs", "said"),
    [
        ("grad-norms-x", [], "grad-norms-x"),
        ("train-x", ["train-x", "s-test-x"], "train-x (1 of 3)"),
        ("s-test-x", ["train-x", "s-test-x"], "s-test-x (2 of 3)"),
        ("influence-x", ["train-x", "s-test-x"], "influence-x (3 of 3)"),
    ],
)
def test_a_run_of_several_tells_its_place(run: str, needs: list[str], said: str) -> None:
    assert named(run, {"needs": needs}) == said


def test_a_shard_that_is_tried_again_is_told(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(str(tmp_path), grad_norms_spec)
    gone = "worker process south:3 is gone: its node was lost"
    with StatusWriter(run) as status:
        status.planned(Plan((), SHARDS, units=600, batch_size=1), {})
        status.started("a", "south:3")
        status.left("a", "south:3")
        status.count(Receipt("a", "failed", gone, "transient"), retried=True)
        status.waits_for(None)
        found = read_status(run)
        assert found["message"] == f"shard a: {gone}; the shard is tried again"
        assert found["failures"] == {"a": gone}
        assert progress_in_words(found)["shards"] == "0 of 6, retries: 1"
        monkeypatch.setattr(status_module, "TOLD_S", 0.0)
        status.count(Receipt("b", "failed", "bad rows", "user"), retried=False)
        status.waits_for(None)
        found = read_status(run)
        assert found["message"] is None
        assert found["failures"]["b"] == "bad rows"
