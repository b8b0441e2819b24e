"""What `verify` finds, damage by damage, and who else notices."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.errors import ModelError, StoreError
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.train.spec import TrainedCheckpoint
from influence_jobs.store import layout
from influence_jobs.store.checkpoints import file_checkpoint, load_checkpoint, recorded_digest
from influence_jobs.store.files import LocalFiles
from influence_jobs.store.lease import Lease
from influence_jobs.store.manifest import checksum
from influence_jobs.store.run import Run, now
from influence_jobs.store.status import STALE_S, read_status
from influence_jobs.store.verify import find_damage, mark_undone
from influence_jobs.tasks.base import Task


@pytest.fixture
def run(tmp_path: Path, finished_run: Run) -> Run:
    """A copy of a finished run, and of the training that it reads."""
    shutil.copytree(finished_run.root, tmp_path / "runs")
    return Run.open(str(tmp_path / "runs"), finished_run.id)


def spec_of_another(run: Run, shard: str) -> None:
    entry = run.manifest.read(shard)
    assert entry is not None
    run.manifest.write(replace(entry, spec="of another"))


def other_numbers(run: Run, shard: str) -> None:
    entry = run.manifest.read(shard)
    assert entry is not None
    rows = run.read_rows("norms/head", entry.start, entry.stop)
    run.write_rows("norms/head", entry.start, rows + 1)


def flipped_bytes(run: Run, shard: str) -> None:
    for file in Path(run.files.url, "data.zarr/norms/head/c").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (spec_of_another, "computed for another spec"),
        (other_numbers, "norms/head is not what was written"),
        (flipped_bytes, "norms/head cannot be read ("),
    ],
)
def test_a_damaged_shard_is_told_from_the_good_ones(
    run: Run, damage: Callable[[Run, str], None], told: str
) -> None:
    shards = [name for name in run.manifest.done() if name != layout.FINISH]
    assert find_damage(run).damaged == {}
    assert find_damage(run).good == find_damage(run).planned == len(shards)
    damage(run, shards[0])
    found = find_damage(run)
    assert set(found.damaged) >= {shards[0]}
    assert found.damaged[shards[0]].startswith(told)
    assert found.good == len(shards) - len(found.damaged)
    mark_undone(run, found.damaged)
    assert set(run.manifest.done()) == {layout.FINISH, *shards} - set(found.damaged)
    status = read_status(run)
    left = len(shards) - len(found.damaged)
    assert (status["state"], status["shards_done"]) == ("stopped", left)
    assert status["units_done"] < status["units_total"]


def test_tables_are_compared_too(run: Run) -> None:
    table = f"{layout.TABLES}/samples.parquet"
    content = run.files.read(table)
    run.files.write(table, content + b"x")
    assert find_damage(run).damaged == {layout.FINISH: f"{table} is not what was written"}
    run.files.delete(table)
    assert find_damage(run).damaged == {layout.FINISH: f"{table} is missing"}
    with pytest.raises(StoreError, match="samples is missing or damaged: infl verify"):
        run.read_table("samples")
    shutil.rmtree(Path(run.root, run.id))
    with pytest.raises(StoreError, match=r"is no longer in .*: bring its folder back, or delete"):
        run.read_table("samples")


def test_a_run_that_has_not_begun_has_nothing_to_verify(
    tmp_path: Path, grad_norms_spec: GradNormsSpec
) -> None:
    run = Run.create(str(tmp_path), grad_norms_spec)
    with pytest.raises(StoreError, match="has not begun: infl resume grad-norms-"):
        find_damage(run)


@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: f.write_bytes(b"x")])
def test_damaged_weights_are_not_loaded(run: Run, digits_task: Task, damage) -> None:
    assert isinstance(run.spec, GradNormsSpec)
    (checkpoint,) = run.spec.checkpoints
    assert isinstance(checkpoint, TrainedCheckpoint)
    model = digits_task.model()
    load_checkpoint(model, run.root, checkpoint)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    damage(Path(run.root, checkpoint.train.run_id, layout.checkpoint_name(2)))
    with pytest.raises(StoreError, match=r"is missing or damaged: infl verify train-.* --repair"):
        load_checkpoint(model, run.root, checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert recorded_digest(run.root, checkpoint.model_copy(update={"epoch": 9})) == ""


def test_a_file_of_weights_that_changed_is_not_loaded(tmp_path: Path, digits_task: Task) -> None:
    torch.save(digits_task.model().state_dict(), tmp_path / "weights.pth")
    checkpoint = file_checkpoint(str(tmp_path / "weights.pth"))
    load_checkpoint(digits_task.model(), "", checkpoint)
    torch.save(digits_task.model().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ModelError, match="has changed since the run was submitted"):
        load_checkpoint(digits_task.model(), "", checkpoint)
    with pytest.raises(ModelError, match=r"cannot read checkpoint .*gone: No such file"):
        file_checkpoint(str(tmp_path / "gone"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="pipe is not a plain file"):
        file_checkpoint(str(tmp_path / "pipe"))


@pytest.mark.parametrize(("silent_s", "state"), [(0, "running"), (STALE_S + 5, "interrupted")])
def test_a_driver_that_says_nothing_for_long_is_gone(run: Run, silent_s: float, state: str) -> None:
    status = {**read_status(run), "state": "running", "updated_at": now() - silent_s}
    run.write_json(layout.STATUS, status)
    assert read_status(run)["state"] == state
    with Lease(run.files):  # it hangs, or its clock is another
        found = read_status(run)
        assert found["state"] == "running"
        told = f"process {os.getpid()}, which computes it, does not respond"
        assert (told in (found["message"] or "")) == (silent_s > 0)
        run.root = "s3://bucket/runs"  # a driver waits for its answer for minutes
        told = "if the storage did not answer, it goes on within a minute; else infl stop "
        assert (told in (read_status(run)["message"] or "")) == (silent_s > 0)


def test_damaged_files_of_a_run_are_named(run: Run) -> None:
    run.files.write(layout.STATUS, b"{")
    with pytest.raises(StoreError, match=rf"{layout.STATUS} is damaged .*: delete it"):
        read_status(run)
    (shard, *_) = run.manifest.done()
    run.files.write(f"manifest/{shard}.json", b'{"nothing": "known"}')
    with pytest.raises(StoreError, match=rf"{shard}.json is damaged .*: delete it and resume"):
        run.manifest.read(shard)


def test_damaged_metadata_of_an_array_are_told_with_the_cure(run: Run) -> None:
    name = next(iter(run.array_names()))
    run.files.write(f"{layout.ARRAYS}/{name}/zarr.json", b"{")
    again = Run(run.root, run.spec)
    assert find_damage(again).good == 0
    with pytest.raises(StoreError, match=r"arrays are damaged .*: infl verify .* --repair, then"):
        Run(run.root, run.spec).array(name)


def test_a_record_without_data_is_damage(run: Run) -> None:
    (shard, *_) = run.manifest.done()
    entry = run.manifest.read(shard)
    assert entry is not None
    run.manifest.write(replace(entry, arrays={}, files={}))
    assert find_damage(run).damaged == {shard: "its record names no data"}


def other_shape(path: Path) -> None:
    found = json.loads(path.read_text())
    found["shape"][0] += 1
    path.write_text(json.dumps(found))


def huge_number(path: Path) -> None:
    found = json.loads(path.read_text())
    found["fill_value"] = 10**400
    path.write_text(json.dumps(found))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "gone": Path.unlink,
    "cut": lambda path: path.write_text("{"),
    "list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
}
OF_ARRAYS = {
    **DAMAGES,
    "empty": lambda path: path.write_text("{}"),
    "shape": other_shape,
    "huge": huge_number,
}


@pytest.mark.parametrize(
    ("which", "damage"),
    [
        *(("zarr.json", damage) for damage in DAMAGES.values()),
        *(("norms/zarr.json", damage) for damage in DAMAGES.values()),
        *(("norms/head/zarr.json", damage) for damage in OF_ARRAYS.values()),
    ],
    ids=[
        *DAMAGES,
        *(f"group, {name}" for name in DAMAGES),
        *(f"array, {name}" for name in OF_ARRAYS),
    ],
)
def test_damaged_metadata_are_found_and_mended(
    run: Run, which: str, damage: Callable[[Path], Any]
) -> None:
    """The chunks stay, and nothing is computed again."""
    before = {name: entry.attempt for name, entry in run.manifest.done().items()}
    damage(Path(run.files.url, "data.zarr", which))
    found = find_damage(Run.open(run.root, run.id))
    assert [*found.damaged] == [layout.ARRAYS]
    mark_undone(run, found.damaged)
    drive(run.root, run.id, InlineBackend())
    again = Run.open(run.root, run.id)
    assert find_damage(again).damaged == {}
    assert {n: e.attempt for n, e in again.manifest.done().items()} == before


def test_a_damaged_request_is_mended_by_the_same_request(run: Run) -> None:
    spec = run.spec
    for damage in (b"{", b"[]", b"", spec.model_dump_json().replace("layer", "leyar").encode()):
        run.files.write(layout.SPEC, damage)
        with pytest.raises(StoreError):
            Run.open(run.root, run.id)
        assert Run.create(run.root, spec).spec == spec
        assert Run.open(run.root, run.id).spec == spec


def lacks_a_shard(plan: dict[str, Any]) -> None:
    del plan["shards"][2]


def has_other_rows(plan: dict[str, Any]) -> None:
    plan["shards"][2]["stop"] += 1


def has_no_shards(plan: dict[str, Any]) -> None:
    plan["shards"] = []


def has_one_twice(plan: dict[str, Any]) -> None:
    plan["shards"].append(plan["shards"][0])


@pytest.mark.parametrize("damage", [lacks_a_shard, has_other_rows, has_no_shards, has_one_twice])
def test_a_plan_that_is_not_that_of_the_records_is_found_and_made_anew(
    run: Run, damage: Callable[[dict[str, Any]], None]
) -> None:
    digest, plan = run.digest(), json.loads(run.files.read(layout.PLAN))
    damage(plan)
    run.write_json(layout.PLAN, plan)
    found = find_damage(run).damaged
    assert [*found] == [layout.PLAN]
    assert found[layout.PLAN].startswith(("it lacks shard", "it has a shard twice"))
    mark_undone(run, found)
    drive(run.root, run.id, InlineBackend())
    assert find_damage(run).damaged == {}
    assert run.digest() == digest


def test_a_record_that_was_changed_is_told(run: Run) -> None:
    path = next(Path(run.files.url, layout.MANIFEST).glob("0*.json"))
    entry = json.loads(path.read_text())
    for change in ({"attempt": 7}, {"arrays": {}}, {"seconds": 1.5}, {"software": {}}):
        path.write_text(json.dumps({**entry, **change}))
        with pytest.raises(
            StoreError, match=r"is damaged \(it was changed\): delete it and resume"
        ):
            run.manifest.done()
    path.write_text(json.dumps({k: v for k, v in entry.items() if k != "checksum"}))
    assert len(run.manifest.done()) == 7  # as earlier versions wrote it


def test_a_record_of_another_version_has_its_own_fields(run: Run) -> None:
    path = next(Path(run.files.url, layout.MANIFEST).glob("0*.json"))
    entry = json.loads(path.read_text())
    del entry["checksum"], entry["worker"]
    entry["later"] = {"b": 1, "a": [1.5e-7]}
    entry["checksum"] = checksum(json.dumps(entry, sort_keys=True).encode())
    path.write_text(json.dumps(entry))
    assert len(run.manifest.done()) == 7
    assert find_damage(run).damaged == {}


def test_what_is_marked_as_undone_stays_so_after_a_power_cut(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the record of the damaged data comes back, and the run ends with them."""
    shard = next(name for name in run.manifest.done() if name != layout.FINISH)
    synced: list[str] = []
    original = LocalFiles.sync

    def sync(self: LocalFiles, names: Iterable[str]) -> None:
        synced.extend(names := list(names))
        original(self, names)

    monkeypatch.setattr(LocalFiles, "sync", sync)
    mark_undone(run, {shard: "damaged"})
    assert f"{layout.MANIFEST}/{shard}.json" in synced
