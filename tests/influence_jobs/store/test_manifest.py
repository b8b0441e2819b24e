"""The summary of a finished run's manifest: when it holds, and what it saves."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infl_cli.runs import list_runs
from influence_jobs.errors import StoreError
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.report.made import made
from influence_jobs.store import layout
from influence_jobs.store.documents import Entry
from influence_jobs.store.files import LocalFiles
from influence_jobs.store.manifest import summary_of
from influence_jobs.store.run import Run
from influence_jobs.store.status import is_done

STATUS = {
    "state": "done", "phase": None, "message": None, "started_at": 1.0, "updated_at": 2.0,
    "shards_done": 1, "shards_total": 1, "units_before": 0, "units_done": 3, "units_total": 3,
    "retries": 0, "failures": {},
}  # fmt: skip


def finished(root: Path, spec: GradNormsSpec, shards: int) -> Run:
    """A run whose manifest is that of a finished one."""
    run = Run.create(str(root), spec)
    ids = [f"{i:09d}" for i in range(shards)]
    for i, shard in enumerate((*ids, layout.FINISH)):
        run.manifest.write(
            Entry(
                shard,
                i,
                i + 1,
                attempt=1 + (i == 2),
                spec=spec.hash,
                state="done",
                arrays={"a": f"{i:064d}"},
                seconds=0.5,
                worker=f"host:{i % 2}",
                software={"torch": "2.0" if i else "1.0"},
                finished_at=100.0 + i,
            )
        )
    plan = [{"id": shard, "start": i, "stop": i + 1} for i, shard in enumerate(ids)]
    run.write_json(layout.PLAN, {"batch_size": 1, "units": 1, "shards": plan, "inputs": {}})
    run.write_json(layout.STATUS, STATUS)
    run.manifest.write_summary()
    return run


@pytest.fixture
def run(tmp_path: Path, grad_norms_spec: GradNormsSpec) -> Run:
    return finished(tmp_path, grad_norms_spec, 4)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read."""
    names: list[str] = []
    original = LocalFiles.read

    def read(self: LocalFiles, name: str, **options: Any) -> bytes:
        names.append(name)
        return original(self, name, **options)

    monkeypatch.setattr(LocalFiles, "read", read)
    return names


@pytest.mark.parametrize("ask", [is_done, Run.digest, made])
def test_what_a_finished_run_says_costs_no_more_with_more_shards(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, reads: list[str], ask: Callable[[Run], object]
) -> None:
    counts = []
    for shards in (3, 30):
        run = finished(tmp_path / str(shards), grad_norms_spec, shards)
        reads.clear()
        assert ask(run)
        counts.append(sorted(reads))
    assert counts[0] == counts[1]
    assert [name for name in counts[0] if name.startswith("manifest/")] == ["manifest/finish.json"]


def test_a_list_of_runs_reads_two_small_files_of_each(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, reads: list[str]
) -> None:
    for seed in range(5):
        finished(tmp_path, grad_norms_spec.model_copy(update={"seed": seed}), 4)
    reads.clear()
    list_runs(str(tmp_path), json=True)
    assert sorted(reads) == ["spec.json"] * 5 + ["status.json"] * 5


def test_it_says_what_the_entries_say(run: Run) -> None:
    with_summary = run.digest(), made(run), is_done(run)
    run.manifest.drop_summary()
    assert run.files.names("") == ["plan.json", "spec.json", "status.json"]
    assert (run.digest(), made(run), is_done(run)) == with_summary
    assert with_summary[2]
    found = with_summary[1]
    assert (found.shards, found.retries, found.seconds, found.workers) == (4, 1, 2.5, 2)
    assert found.ended == "1970-01-01 00:01 UTC"
    assert found.software == ["torch 2.0: 4 of 5 shards", "torch 1.0: 1 of 5 shards"]


def missing_entry(run: Run) -> None:
    run.files.delete(f"{layout.MANIFEST}/000000001.json")


def another_finish(run: Run) -> None:
    """As an earlier version of infl leaves it, which knows no summary."""
    entry = run.manifest.read("000000001")
    finish = run.manifest.read(layout.FINISH)
    run.manifest.write(replace(entry, arrays={"a": "other"}))
    run.manifest.write(replace(finish, finished_at=200.0))


def damaged(run: Run) -> None:
    path = Path(run.files.url, layout.SUMMARY)
    path.write_bytes(path.read_bytes()[:-9])
    run.manifest.write(replace(run.manifest.read("000000001"), arrays={"a": "other"}))


def of_another_type(run: Run) -> None:
    run.files.write(layout.SUMMARY, b"[]")
    run.manifest.write(replace(run.manifest.read("000000001"), arrays={"a": "other"}))


def a_link(run: Run) -> None:
    path = Path(run.files.url, layout.SUMMARY)
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")
    run.manifest.write(replace(run.manifest.read("000000001"), arrays={"a": "other"}))


@pytest.mark.parametrize(
    "change", [missing_entry, another_finish, damaged, of_another_type, a_link]
)
def test_a_summary_that_does_not_hold_is_not_believed(
    run: Run, change: Callable[[Run], None]
) -> None:
    before = run.digest()
    change(run)
    assert run.digest() != before
    assert is_done(run) == (change is not missing_entry)


def test_an_empty_entry_is_one_that_a_power_cut_undid(run: Run) -> None:
    run.files.write(f"{layout.MANIFEST}/000000001.json", b"")
    assert run.manifest.read("000000001") is None
    assert [*run.manifest.done()] == ["000000000", "000000002", "000000003", "finish"]


def test_an_entry_of_another_shard_is_damaged(run: Run) -> None:
    data = run.files.read(f"{layout.MANIFEST}/000000000.json")
    run.files.write(f"{layout.MANIFEST}/000000001.json", data)
    told = r"manifest/000000001\.json is damaged \(it is of 000000000\): delete it and resume"
    with pytest.raises(StoreError, match=told):
        run.manifest.done()


def test_the_digest_of_earlier_runs_is_the_same(run: Run) -> None:
    """Written out by hand, as in plans of earlier runs."""
    sums = {
        entry.shard: [dict(entry.arrays), dict(entry.files)]
        for entry in sorted(run.manifest.entries(), key=lambda e: e.shard)
    }
    assert run.digest() == hashlib.sha256(json.dumps(sums).encode()).hexdigest()
    assert summary_of([], "")["digest"] == hashlib.sha256(b"{}").hexdigest()


def test_a_done_entry_is_durable_before_it_is_told(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is running need not be: a power cut undoes it. No more is waited for."""
    synced: list[Any] = []
    monkeypatch.setattr("influence_jobs.store.files._sync", lambda path: synced.append(path))
    run = Run.create(str(tmp_path), grad_norms_spec)
    synced.clear()
    running = Entry("a", 0, 1, 1, grad_norms_spec.hash)
    run.manifest.write(running)
    assert synced == []
    run.manifest.write(replace(running, state="done", arrays={"a": "0"}))
    folder = Path(run.files.url, layout.MANIFEST)
    assert sorted(synced) == [folder, folder / "a.json"]
