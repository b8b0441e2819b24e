"""Which hosts do a run's shards, as its status tells it."""

from pathlib import Path

import pytest

from infl_cluster import status as status_module
from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from infl_cluster.status import StatusWriter
from influence_jobs.jobs.base import Plan, Receipt, Shard
from influence_jobs.kinds import missing_inputs
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.runner import this_process
from influence_jobs.store.documents import Entry
from influence_jobs.store.run import Run
from influence_jobs.store.status import named, progress_in_words, read_status

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
        status.count(done_by("c", "north:2"), retried=False)
        status.count(Receipt("d", "failed", "no"), retried=True)
        status.waits_for(None)
        said = progress_in_words(read_status(run))
        assert said["shards by node"] == "north 2"
        assert said["workers by node"] == "south 1"
        status.started("d", "north:2")
        status.started("e", "north:5")  # a backup: the first attempt wins
        status.count(done_by("e", "south:4"), retried=False)
        status.count(done_by("d", "north:2"), retried=False)
        status.again([SHARDS[2]])
    found = read_status(run)
    assert found["nodes"] == {
        "north": {"shards": 2, "at_work": 0},
        "south": {"shards": 1, "at_work": 0},
    }
    assert progress_in_words(found)["shards by node"] == "north 2, south 1"
    assert "workers by node" not in progress_in_words(found)


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
