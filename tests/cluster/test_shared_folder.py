"""Nodes that do not see the folder of a run: nothing is taken for done that is elsewhere."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from infl_cluster import driver as driver_module
from infl_cluster import driver_main, pool, shipping, versions
from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from infl_cluster.pool import RayBackend, ShardWorker
from influence_jobs.errors import DataError, ModelError, StoreError
from influence_jobs.jobs.base import Shard
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.specs.base import TaskSpec
from influence_jobs.store import layout
from influence_jobs.store import lease as lease_module
from influence_jobs.store.files import LocalFiles
from influence_jobs.store.lease import Lease, holder_of
from influence_jobs.store.run import Run
from influence_jobs.store.status import is_done, read_status
from influence_jobs.store.verify import find_damage
from influence_jobs.tasks.registry import make_task

TOLD = ("on_start", "on_leave", "on_receipt", "on_rescue", "on_idle", "quiet_s")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHOWN_S", "NO_FOLDER_S"):
        monkeypatch.setattr(lease_module, name, 0.0)
    monkeypatch.setattr(driver_module, "SHOWN_S", 0.0)


class TwoDisks(InlineBackend):
    """The second half of the shards goes to a disk of another node, where the run is as well."""

    def run(self, run: Run, shards: Any, **told: Any) -> None:
        half = len(shards) // 2
        super().run(run, shards[:half], **told)
        theirs = Path(run.root).with_name("theirs")
        shutil.copytree(run.root, theirs, dirs_exist_ok=True)
        super().run(Run.open(str(theirs), run.id), shards[half:], **told)


def test_a_run_is_not_done_if_its_folder_lacks_records(
    tmp_path: Path, grad_norms_spec: GradNormsSpec
) -> None:
    run = Run.create(str(tmp_path / "ours"), grad_norms_spec)
    with pytest.raises(StoreError, match=r"^\d+ of \d+ shards are not in .*/ours/.* all nodes sha"):
        drive(run.root, run.id, TwoDisks())
    assert read_status(run)["state"] == "failed"
    assert not is_done(run)
    drive(run.root, run.id, InlineBackend())
    assert find_damage(run).missing == ()


def test_a_listing_that_is_old_ends_no_run(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS shows what it has seen of a folder for up to a minute; a file is found by its name."""
    run = Run.create(str(tmp_path), grad_norms_spec)
    train = Run.create(run.root, grad_norms_spec.checkpoints[0].train)  # type: ignore[union-attr]
    drive(train.root, train.id, InlineBackend())
    names = LocalFiles.names

    def old(self: LocalFiles, folder: str) -> list[str]:
        return [] if folder == layout.MANIFEST and run.id in self.url else names(self, folder)

    monkeypatch.setattr(LocalFiles, "names", old)
    told: list[str] = []
    monkeypatch.setattr(driver_module, "_finish", lambda run, job: told.append(run.id))
    drive(run.root, run.id, InlineBackend())
    assert told == [run.id]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{}, {}])
    monkeypatch.setattr(shipping, "unpack", lambda: None)
    monkeypatch.setattr("socket.gethostname", lambda: "node2")


def refusal_of(root: Path, run_id: str, **options: Any) -> str:
    runner = f"{__name__}:Loads"
    worker = ShardWorker(
        str(root), run_id, kind="test", device="cpu", threads=1, runner=runner, **options
    )
    return worker.begin()[0] or ""


class Loads:
    """A runner whose root says what fails."""

    def __init__(self, root: str, run_id: str, **_: Any) -> None:
        if "gone" in root:
            open(os.path.join(root, "rows.pt"))  # noqa: PTH118, PTH123, SIM115
        if "weights" in root:
            raise ModelError("cannot read checkpoint w.pt") from FileNotFoundError("w.pt")


@pytest.mark.usefixtures("nodes")
def test_a_worker_refuses_another_folder_of_the_same_path(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(str(tmp_path), grad_norms_spec)
    with Lease(run.files):
        said = refusal_of(tmp_path, run.id, owner="another")
        assert said.startswith(f"on node node2: {run.files.url} is not the folder of the run there")
        assert said.endswith("(--node-label chooses the nodes that compute)")
        holder = holder_of(run.files)
        assert holder is not None
        assert refusal_of(tmp_path, run.id, owner=holder["owner"]) == ""


def test_workers_are_told_whose_lease_they_are_to_find(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    remote = SimpleNamespace(remote=lambda *_, **given: told.update(given))
    monkeypatch.setattr(
        ray, "remote", lambda _: SimpleNamespace(options=lambda **_: remote), raising=False
    )
    monkeypatch.setattr(pool, "require_same_software", lambda _: None)
    monkeypatch.setattr(RayBackend, "_live", lambda _: [])
    monkeypatch.setattr(RayBackend, "_sizes", lambda *_: (1, 1))

    def starts(start: Any, *_: object) -> None:
        start()
        raise InterruptedError

    monkeypatch.setattr(pool, "Actors", starts)
    run = Run.create(str(tmp_path), grad_norms_spec)
    with Lease(run.files):
        holder = holder_of(run.files)
        with pytest.raises(InterruptedError):
            RayBackend(1, num_gpus=0).run(run, [Shard("a", 0, 1)], **dict.fromkeys(TOLD, print))  # type: ignore[arg-type]
    assert holder is not None
    assert told["owner"] == holder["owner"]


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("folder", ["gone", "weights"])
def test_a_file_that_a_node_lacks_is_told_with_the_node_and_the_cure(
    tmp_path: Path, folder: str
) -> None:
    said = refusal_of(tmp_path / folder, "x")
    assert said.startswith("on node node2: ")
    assert "(each node that computes needs the data and weights, at the same place or" in said


def test_a_driver_that_does_not_see_the_run_names_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shipping, "unpack", lambda: None)
    monkeypatch.setattr(driver_main, "stop_on_sigterm", lambda _: None)
    monkeypatch.setattr(versions, "require_same", lambda: None)
    monkeypatch.setattr("socket.gethostname", lambda: "head")
    monkeypatch.setattr(sys, "argv", ["driver_main", str(tmp_path), "grad-norms-x"])
    assert driver_main.main() == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/grad-norms-x is not on head, the node that directs the run: put the "
        "runs on storage that all nodes share, and name that with --runs\n"
    )


def test_a_task_without_its_file_names_file_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reads_rows.py").write_text(
        "from digits import DigitsTask\n"
        "class Rows(DigitsTask):\n"
        "    def __init__(self):\n"
        "        open('/nowhere/rows.pt')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("influence_jobs.tasks.registry.let_import", lambda *_: None)
    monkeypatch.setattr("socket.gethostname", lambda: "node2")
    with pytest.raises(DataError, match=r"reads_rows:Rows' finds no /nowhere/rows\.pt on node2"):
        make_task(TaskSpec(name="reads_rows:Rows", data=""))
