"""The driver with the in-process backend: what must hold with every backend."""

import dataclasses
import itertools
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from infl_cluster import status as status_module
from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from infl_cluster.plans import new_plan
from infl_cluster.speed import Speed
from infl_cluster.status import StatusWriter
from influence_jobs.errors import InflError, RuntimeFault, SpecError, StoreError
from influence_jobs.jobs import saved_state
from influence_jobs.jobs.base import Plan, Shard
from influence_jobs.jobs.samples import SampleJob
from influence_jobs.kinds import open_job
from influence_jobs.kinds import runner as runner_module
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.store import layout
from influence_jobs.store.documents import Entry
from influence_jobs.store.layout import ArrayLayout
from influence_jobs.store.run import Run
from influence_jobs.store.software import PACKAGE
from influence_jobs.store.status import is_done, rate_and_eta, read_status
from influence_jobs.store.top import largest_rows
from influence_jobs.store.verify import find_damage, mark_entry_undone, mark_undone
from influence_jobs.tasks.base import Draw


def shas(run: Run) -> dict[str, bytes]:
    return {
        str(path.relative_to(run.files.url)): path.read_bytes()
        for path in sorted(Path(run.files.url, layout.ARRAYS).rglob("*"))
        if path.is_file()
    }


def shards_done(run: Run) -> dict[str, Entry]:
    return {s: entry for s, entry in run.manifest.done().items() if s != layout.FINISH}


def carry_out(root: Path, spec: GradNormsSpec, **plan: int) -> Run:
    run = Run.create(str(root), spec)
    drive(str(root), run.id, InlineBackend(), **plan)
    return run


@pytest.mark.parametrize("shard_rows", [256, 700, 5000])
def test_stored_bytes_do_not_depend_on_the_size_of_shards(
    tmp_path: Path,
    grad_norms_spec: GradNormsSpec,
    finished_run: Run,
    shard_rows: int,
    trained_root: Path,
) -> None:
    shutil.copytree(trained_root, tmp_path / "runs")
    run = carry_out(tmp_path / "runs", grad_norms_spec, shard_rows=shard_rows)
    assert shas(run) == shas(finished_run)


@pytest.mark.parametrize("batch_size", [17, 256])
def test_batches_change_the_numbers_by_rounding_only(
    tmp_path: Path,
    grad_norms_spec: GradNormsSpec,
    finished_run: Run,
    batch_size: int,
    trained_root: Path,
) -> None:
    shutil.copytree(trained_root, tmp_path / "runs")
    run = carry_out(tmp_path / "runs", grad_norms_spec, batch_size=batch_size)
    for name in run.array_names():
        found, expected = run.array(name)[:], finished_run.array(name)[:]
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_norms_are_those_of_each_sample_alone(finished_run: Run, digits_task: object) -> None:
    from influence_jobs.gradients.reference import per_sample_gradients
    from influence_jobs.store.checkpoints import load_checkpoint
    from influence_jobs.tasks.base import Draw, Task

    task = digits_task
    assert isinstance(task, Task)
    spec = finished_run.spec
    assert isinstance(spec, GradNormsSpec)
    model = task.model().eval()
    load_checkpoint(model, finished_run.root, spec.checkpoints[0])
    # Only the largest norms: float32 loses digits of 1 - p where a sample is fitted very well.
    rows, _ = largest_rows(finished_run, "norms/conv2", 8)
    ids = torch.from_numpy(rows)
    gradients = per_sample_gradients(model, ["conv2"], task.losses, task.batch(ids, Draw(0)))
    expected = gradients["conv2"].square().sum(2).sqrt().sum((2, 3)).numpy()
    found = finished_run.array("norms/conv2")[:][ids.numpy()]
    assert np.abs(found - expected).max() < 1e-5 * expected.max()


def test_a_finished_run_is_not_touched_again(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InlineBackend, "run", lambda *_a, **_k: pytest.fail("computed again"))
    drive(finished_run.root, finished_run.id, InlineBackend())
    assert is_done(finished_run)


def test_an_interrupted_run_goes_on_without_computing_finished_shards_again(
    tmp_path: Path,
    grad_norms_spec: GradNormsSpec,
    finished_run: Run,
    trained_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(trained_root, tmp_path / "runs")
    run = Run.create(str(tmp_path / "runs"), grad_norms_spec)
    original, calls = runner_module.ShardRunner.run, []

    def dies_at_the_third(self: runner_module.ShardRunner, shard: object) -> object:
        calls.append(shard)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, shard)  # type: ignore[arg-type]

    monkeypatch.setattr(runner_module.ShardRunner, "run", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        drive(run.root, run.id, InlineBackend(), shard_rows=256)
    assert read_status(run)["state"] == "stopped"
    finished_at = {s: e.finished_at for s, e in shards_done(run).items()}
    assert len(finished_at) == 2

    monkeypatch.setattr(runner_module.ShardRunner, "run", original)
    drive(run.root, run.id, InlineBackend())
    done = shards_done(run)
    assert len(done) == 6
    assert {s: e.finished_at for s, e in done.items() if s in finished_at} == finished_at
    assert all(entry.attempt == 1 for entry in done.values())
    assert shas(run) == shas(finished_run)


def test_damage_is_found_and_repaired(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, finished_run: Run, trained_root: Path
) -> None:
    shutil.copytree(trained_root, tmp_path / "runs")
    run = carry_out(tmp_path / "runs", grad_norms_spec, shard_rows=256)
    assert find_damage(run).damaged == {}
    chunks = sorted(Path(run.files.url, "data.zarr/norms/conv2/c/0").iterdir())
    flipped = bytearray(chunks[0].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    chunks[0].write_bytes(bytes(flipped))
    Path(run.files.url, "data.zarr/norms/head/c/3/0").unlink()

    check = find_damage(run)
    assert list(check.damaged) == ["000000000-000000256", "000000768-000001024"]
    mark_undone(run, check.damaged)
    drive(run.root, run.id, InlineBackend())
    assert find_damage(run).damaged == {}
    assert shards_done(run)["000000000-000000256"].attempt == 2
    assert shards_done(run)["000000256-000000512"].attempt == 1
    assert shas(run) == shas(finished_run)


def test_a_shard_that_two_workers_were_at_is_compared_by_the_next_driver(
    tmp_path: Path, finished_run: Run
) -> None:
    """The driver under which it happened was ended first, with another shard to do."""
    shutil.copytree(finished_run.root, tmp_path / "runs")
    run = Run.open(str(tmp_path / "runs"), finished_run.id)
    first, second, *_ = run.plan()["shards"]  # type: ignore[index]
    whole = run.read_rows("norms/head", 0, 1500)
    start = second["start"]
    run.write_rows("norms/head", start, whole[start : second["stop"]] + np.float32(1e-3))
    for shard in (first["id"], layout.FINISH):
        mark_entry_undone(run, shard)
    run.manifest.drop_summary()
    run.files.create(f"{layout.CONTESTED}/{second['id']}", b"")
    drive(run.root, run.id, InlineBackend())
    np.testing.assert_array_equal(run.read_rows("norms/head", 0, 1500), whole)
    assert run.files.names(layout.CONTESTED) == []
    assert find_damage(run).damaged == {}


def test_a_changed_spec_is_refused(tmp_path: Path, finished_run: Run) -> None:
    shutil.copytree(finished_run.root, tmp_path / "runs")
    path = tmp_path / "runs" / finished_run.id / "spec.json"
    spec = json.loads(path.read_text())
    spec["seed"] = 7
    path.write_text(json.dumps(spec))
    with pytest.raises(StoreError, match=r"spec\.json was changed"):
        Run.open(str(tmp_path / "runs"), finished_run.id)


def test_shards_of_another_spec_are_refused(tmp_path: Path, finished_run: Run) -> None:
    shutil.copytree(finished_run.root, tmp_path / "runs")
    run = Run.open(str(tmp_path / "runs"), finished_run.id)
    shard, entry = next(iter(shards_done(run).items()))
    path = tmp_path / "runs" / run.id / layout.MANIFEST / f"{shard}.json"
    forged = {**json.loads(path.read_text()), "spec": "f" * 64, "checksum": ""}
    path.write_text(json.dumps(forged))
    assert entry.spec != "f" * 64
    run.files.delete(layout.STATUS)
    with pytest.raises(StoreError, match="computed for another spec"):
        drive(run.root, run.id, InlineBackend())


def test_changed_training_data_are_refused(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, trained_root: Path
) -> None:
    shutil.copytree(trained_root, tmp_path / "runs")
    other = grad_norms_spec.task.model_copy(update={"data": "n=7"})
    run = Run.create(str(tmp_path / "runs"), grad_norms_spec.model_copy(update={"task": other}))
    with pytest.raises(SpecError, match=r"training data .* are not those"):
        drive(run.root, run.id, InlineBackend())


def test_a_shard_that_cannot_be_computed_does_not_stop_the_others(
    tmp_path: Path,
    grad_norms_spec: GradNormsSpec,
    trained_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from influence_jobs.kinds.grad_norms.job import GradNormsJob

    shutil.copytree(trained_root, tmp_path / "runs")
    run = Run.create(str(tmp_path / "runs"), grad_norms_spec)
    original = GradNormsJob.read

    def one_bad_sample(self: GradNormsJob, ids: torch.Tensor, draw: Draw) -> object:
        images, labels = original(self, ids, draw)
        images[ids == 700] = float("nan")
        return images, labels

    monkeypatch.setattr(GradNormsJob, "read", one_bad_sample)
    with pytest.raises(
        RuntimeFault, match=r"1 of 6 shards failed.*not finite for sample 700 \(label \d\)"
    ):
        drive(run.root, run.id, InlineBackend(), shard_rows=256)
    assert len(shards_done(run)) == 5
    assert read_status(run)["state"] == "failed"
    log = run.files.read(f"{layout.LOGS}/{run.files.names(layout.LOGS)[0]}").decode()
    assert "sample 700" in log


def test_a_full_disk_ends_the_run_and_keeps_what_is_there(
    tmp_path: Path,
    grad_norms_spec: GradNormsSpec,
    trained_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(trained_root, tmp_path / "runs")
    run = Run.create(str(tmp_path / "runs"), grad_norms_spec)
    original, written = Run.write_rows, []

    def full_at_the_fourth(self: Run, *args: object) -> str:
        written.append(args)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "write_rows", full_at_the_fourth)
    with pytest.raises(InflError, match="the disk is full"):
        drive(run.root, run.id, InlineBackend(), shard_rows=256)
    assert len(shards_done(run)) == 1
    monkeypatch.setattr(Run, "write_rows", original)
    drive(run.root, run.id, InlineBackend())
    assert is_done(run)
    assert find_damage(run).damaged == {}


def test_several_checkpoints_are_summed_or_kept(
    tmp_path: Path, trained_root: Path, grad_norms_spec: GradNormsSpec
) -> None:
    from influence_jobs.kinds.train.spec import TrainedCheckpoint

    shutil.copytree(trained_root, tmp_path / "runs")
    train = grad_norms_spec.checkpoints[0].train  # type: ignore[union-attr]
    both = tuple(TrainedCheckpoint(train=train, epoch=epoch) for epoch in (1, 2))
    alone = [
        carry_out(tmp_path / "runs", grad_norms_spec.model_copy(update={"checkpoints": (c,)}))
        for c in both
    ]
    summed = carry_out(tmp_path / "runs", grad_norms_spec.model_copy(update={"checkpoints": both}))
    kept = carry_out(
        tmp_path / "runs",
        grad_norms_spec.model_copy(update={"checkpoints": both, "combine": "keep"}),
    )
    for name in summed.array_names():
        expected = np.stack([run.array(name)[:] for run in alone])
        assert not np.array_equal(expected[0], expected[1])
        np.testing.assert_array_equal(kept.array(name)[:], expected)
        total = np.asarray(summed.array(name)[:])
        np.testing.assert_allclose(total, expected.sum(0), rtol=1e-6)
    assert kept.array("norms/conv2").chunks == (1, 256, 16)


def test_tables_are_verified_and_written_again(tmp_path: Path, finished_run: Run) -> None:
    shutil.copytree(finished_run.root, tmp_path / "runs")
    run = Run.open(str(tmp_path / "runs"), finished_run.id)
    table = run.read_table("samples")
    run.files.delete("tables/samples.parquet")
    damaged = find_damage(run).damaged
    assert damaged == {layout.FINISH: "tables/samples.parquet is missing"}
    mark_undone(run, damaged)
    drive(run.root, run.id, InlineBackend())
    assert run.read_table("samples").equals(table)
    assert all(entry.attempt == 1 for entry in shards_done(run).values())


def test_shards_of_two_versions_of_the_weights_are_not_mixed(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, finished_run: Run
) -> None:
    shutil.copytree(finished_run.root, tmp_path / "runs")
    run = Run.open(str(tmp_path / "runs"), finished_run.id)
    train = Run(run.root, grad_norms_spec.checkpoints[0].train)  # type: ignore[union-attr]
    entry = train.manifest.done()["all"]
    files = {**entry.files, "checkpoints/epoch-0002.pt": "0" * 64}
    train.manifest.write(dataclasses.replace(entry, files=files))
    mark_undone(run, {"000000000-000000256": "for the test"})
    with pytest.raises(
        StoreError, match=r"an earlier train-digitstask-\w+@2, which has been computed again"
    ):
        drive(run.root, run.id, InlineBackend())


def test_a_lost_plan_is_made_again(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, finished_run: Run, trained_root: Path
) -> None:
    shutil.copytree(trained_root, tmp_path / "runs")
    run = carry_out(tmp_path / "runs", grad_norms_spec, shard_rows=512)
    run.files.delete(layout.PLAN)
    drive(run.root, run.id, InlineBackend())
    assert is_done(run)
    assert find_damage(run).damaged == {}
    assert shas(run) == shas(finished_run)


def test_a_plan_of_a_later_version_is_refused(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, trained_root: Path
) -> None:
    shutil.copytree(trained_root, tmp_path / "runs")
    run = carry_out(tmp_path / "runs", grad_norms_spec)
    plan: dict[str, Any] = {**(run.plan() or {})}
    plan["shards"][0]["later"] = 1
    run.write_json(layout.PLAN, plan)
    run.files.delete(layout.STATUS)
    with pytest.raises(StoreError, match=r"plan\.json is of a later version \(shards have later\)"):
        drive(run.root, run.id, InlineBackend())


def test_a_run_learns_where_its_inputs_lie_now(
    tmp_path: Path, grad_norms_spec: GradNormsSpec
) -> None:
    old, new = (
        grad_norms_spec.model_copy(
            update={"task": grad_norms_spec.task.model_copy(update={"paths": {"images": path}})}
        )
        for path in ("/old", "/new")
    )
    assert Run.create(str(tmp_path), old).id == Run.create(str(tmp_path), new).id
    assert Run.open(str(tmp_path), old.run_id).spec.task.paths == {"images": "/new"}


def test_a_diverged_training_fails(tmp_path: Path, grad_norms_spec: GradNormsSpec) -> None:
    train = grad_norms_spec.checkpoints[0].train  # type: ignore[union-attr]
    run = Run.create(str(tmp_path), train.model_copy(update={"lr": 1e30}))
    with pytest.raises(InflError, match="diverged: the loss is not finite in epoch 1, step 2;"):
        drive(run.root, run.id, InlineBackend())


def test_a_run_that_does_not_move_says_so(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_module, "QUIET_S", 0.01)
    run = Run.create(str(tmp_path), grad_norms_spec)
    with StatusWriter(run) as status:
        time.sleep(0.05)
        status.waits_for(None)
        assert "no progress for 0 s" in str(read_status(run)["message"])
        status.waits_for("train-something")  # it makes progress itself
        time.sleep(0.05)
        status.waits_for("train-something")
        assert read_status(run)["message"] is None


def test_the_rate_does_not_count_what_earlier_attempts_did(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(time=100.0)
    monkeypatch.setattr(status_module, "Speed", lambda: Speed(lambda: clock.time))
    run = Run.create(str(tmp_path), grad_norms_spec)
    shards = (Shard("a", 0, 100), Shard("b", 100, 300))
    done = Entry("a", 0, 100, attempt=1, spec="", state="done")
    with StatusWriter(run) as status:
        status.planned(Plan((), shards, units=3000, batch_size=1), {"a": done})
        clock.time += 60  # until there is a worker
        status.started("b", "here:1")
        for units, seconds in ((500, 20), (600, 2), (680, 8)):  # it loads its model first
            clock.time += seconds
            run.write_json(f"{layout.PROGRESS}/b.json", {"units": units, "resumed": 500})
            status.waits_for(None)
        found = read_status(run)
    assert (found["units_before"], found["units_done"]) == (1500, 1680)
    assert rate_and_eta(found) == pytest.approx((10, 132))


def test_a_resumed_training_tells_where_it_starts(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_state, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(saved_state, "SAVE_SHARE", 1e9)
    train = grad_norms_spec.checkpoints[0].train  # type: ignore[union-attr]
    whole = Run.create(str(tmp_path / "whole"), train)
    drive(whole.root, whole.id, InlineBackend())
    run = Run.create(str(tmp_path / "cut"), train)
    reported: list[int] = []

    def cut_at_2000(done: int) -> None:
        reported.append(done)
        if done >= 2000:
            raise KeyboardInterrupt

    job = open_job(run)
    shard = job.plan().shards[0]
    with pytest.raises(KeyboardInterrupt):
        job.run(shard, cut_at_2000)
    again: list[int] = []
    result = open_job(run).run(shard, again.append)
    assert reported[0] == 0
    assert 1900 < again[0] <= 2000
    assert again[-1] == 3000
    weights = "checkpoints/epoch-0002.pt"
    assert result.files[weights] == whole.manifest.done()["all"].files[weights]


def test_a_run_that_goes_on_has_no_summary(
    tmp_path: Path, finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is said of its entries would be of those before."""
    shutil.copytree(finished_run.root, tmp_path / "runs")
    run = Run.open(str(tmp_path / "runs"), finished_run.id)
    assert layout.SUMMARY in run.files.names("")
    run.files.delete(layout.STATUS)
    entry = next(e for name, e in run.manifest.done().items() if name != layout.FINISH)
    run.manifest.write(dataclasses.replace(entry, state="running", arrays={}, files={}))
    seen: list[bool] = []

    class Backend(InlineBackend):
        def run(self, *args: Any, **options: Any) -> None:
            seen.append(layout.SUMMARY in run.files.names(""))
            super().run(*args, **options)

    drive(run.root, run.id, Backend())
    assert seen == [False]
    assert layout.SUMMARY in run.files.names("")


class PlanOnly(SampleJob[Any]):
    """Rows of 4 bytes, without a model and data."""

    title, passes, checkpoints, batch_size, num_rows = "plan", 1, (), 1, 2_000_000
    inputs = run = probe = None  # type: ignore[assignment]

    def __init__(self) -> None:
        pass

    def layouts(self) -> tuple[ArrayLayout, ...]:
        return (ArrayLayout("a", (self.num_rows,), 0, 1024, ("sample",)),)


@pytest.mark.parametrize(
    ("workers", "shards"), [(1, 245), (15, 245), (20, 280), (64, 977), (512, 1954)]
)
def test_many_workers_get_more_shards_up_to_one_a_chunk(workers: int, shards: int) -> None:
    plan = new_plan(PlanOnly(), None, workers)
    assert len(plan.shards) == shards
    bounds = [(shard.start, shard.stop) for shard in plan.shards]
    assert [start for start, _ in bounds[1:]] == [stop for _, stop in bounds[:-1]]
    assert (bounds[0][0], bounds[-1][1]) == (0, 2_000_000)
    assert new_plan(PlanOnly(), 100_000, workers) == new_plan(PlanOnly(), 100_000, 1)


def test_a_large_run_of_an_earlier_version_is_not_mixed_with_larger_chunks(
    tmp_path: Path,
    trained_root: Path,
    grad_norms_spec: GradNormsSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(trained_root, tmp_path / "runs")
    run = carry_out(tmp_path / "runs", grad_norms_spec)
    plan = json.loads(run.files.read(layout.PLAN))
    assert set(plan.pop("chunks")) == set(run.array_names())
    run.write_json(layout.PLAN, plan)
    run.files.delete(layout.STATUS)
    drive(run.root, run.id, InlineBackend())  # its chunks are those of any version
    run.files.delete(layout.STATUS)
    monkeypatch.setattr(layout, "MAX_CHUNK_ROWS", 128)
    with pytest.raises(StoreError, match="begun by an earlier version, in smaller chunks"):
        drive(run.root, run.id, InlineBackend())


def test_a_commit_during_a_run_of_this_machine_does_not_end_it(
    tmp_path, trained_root, grad_norms_spec, finished_run, monkeypatch
):
    """Other revisions and versions are noted, shard by shard, and the run goes on."""
    shutil.copytree(trained_root, tmp_path / "runs")
    count = itertools.count()
    monkeypatch.setattr(
        runner_module, "software", lambda: {PACKAGE: "9", "revision": f"{next(count)}"}
    )
    run = carry_out(tmp_path / "runs", grad_norms_spec, shard_rows=700)
    assert is_done(run)
    revisions = [entry.software["revision"] for entry in shards_done(run).values()]
    assert len({*revisions}) == len(revisions) > 1
    assert shas(run) == shas(finished_run)
