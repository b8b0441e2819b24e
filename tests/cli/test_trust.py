"""Looking at a run from a stranger imports none of its code."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from influence_jobs.errors import UntrustedCode
from influence_jobs.specs.base import TaskSpec
from influence_jobs.tasks import trust
from influence_jobs.tasks.registry import task_class

Infl = Callable[..., Any]

TASK = """
from pathlib import Path
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from influence_jobs import Task

Path({mark!r}).touch()


class Theirs(Task):
    def model(self):
        return nn.Linear(3, 2)

    def train_data(self):
        torch.manual_seed(0)
        return TensorDataset(torch.randn(20, 3), torch.arange(20) % 2)

    test_data = train_data
    output_loss = "cross-entropy"

    def outputs(self, model, batch):
        return model(batch[0])

    def targets(self, batch):
        return batch[1]

    def losses(self, model, batch):
        return F.cross_entropy(self.outputs(model, batch), batch[1], reduction="none")
"""
INFLUENCE = ("influence", "--task", "payload:Theirs", "--epochs", 1, "--test", 0, "--local")


@pytest.fixture
def strangers(infl: Infl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """An influence run made elsewhere, and the file that its task's code makes when imported."""
    monkeypatch.setattr(trust, "_everything", False)
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    mark = tmp_path / "executed"
    (tmp_path / "payload.py").write_text(TASK.format(mark=str(mark)))
    made = infl("submit", *INFLUENCE, "--solver", "cg", "--json")
    assert made.code == 0, made.err
    # As on another machine: nothing is imported, and nothing was named.
    monkeypatch.delitem(sys.modules, "payload")
    monkeypatch.setenv("INFL_HOME", str(tmp_path / "home"))
    mark.unlink()
    return made.json["run"], mark


@pytest.mark.parametrize("command", ["report", "top", "status", "verify", "logs"])
def test_looking_imports_nothing(infl: Infl, strangers: tuple[str, Path], command: str) -> None:
    run, mark = strangers
    found = infl(command, run)
    assert found.code == 0, found.err
    assert not mark.exists()


def test_the_report_says_what_is_missing(infl: Infl, strangers: tuple[str, Path]) -> None:
    run, mark = strangers
    found = infl("report", run)
    assert not mark.exists()
    page = Path(found.out.strip()).read_text()
    assert "payload.py, which you have not named on this machine: read it, then add --trust" in page


def test_what_needs_the_code_is_refused_until_one_says_so(
    infl: Infl, strangers: tuple[str, Path]
) -> None:
    run, mark = strangers
    training = next(Path("runs").glob("train-*")).name
    for words in (
        ("top", run, "--png", "sheet.png"),
        ("submit", "influence", "--checkpoint", training, "--test", 1, "--local"),
        ("resume", run),
    ):
        found = infl(*words)
        if words[0] != "resume":  # it is done, so there is nothing to run
            assert found.code == 2, words
            assert (
                "which you have not named on this machine: read it, then add --trust" in found.err
            )
        assert not mark.exists(), words
    again = infl("submit", "influence", "--checkpoint", training, "--test", 1, "--local", "--trust")
    assert again.code == 0, again.err
    assert mark.exists()


def test_naming_the_task_is_enough(
    infl: Infl, strangers: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, mark = strangers
    again = infl("submit", *INFLUENCE, "--solver", "cg", "--json")
    assert again.json["run"] == run
    assert mark.exists()
    monkeypatch.delitem(sys.modules, "payload")
    assert infl("top", run, "--png", "sheet.png").code == 0


def test_a_run_below_where_one_works_names_no_trusted_file(
    infl: Infl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `runs.x.payload:Task`, which Python would find below the working directory."""
    monkeypatch.setattr(trust, "_everything", False)
    mark = tmp_path / "executed"
    (tmp_path / "own_task_of_trust.py").write_text(TASK.format(mark=str(tmp_path / "fine")))
    made = infl(
        "submit", "train", "--task", "own_task_of_trust:Theirs", "--epochs", 1, "--local", "--json"
    ).json["run"]
    spec = json.loads((tmp_path / "runs" / made / "spec.json").read_text())
    payload = tmp_path / "runs" / "x"
    payload.mkdir()
    (payload / "payload.py").write_text(TASK.format(mark=str(mark)))
    from influence_jobs.specs.base import parse_spec
    from influence_jobs.store.run import Run

    spec["task"]["name"] = "runs.x.payload:Theirs"
    theirs = Run.create(str(tmp_path / "runs"), parse_spec(json.dumps(spec), "x"))
    for command in ("report", "status", "top"):
        infl(command, theirs.id)
        assert not mark.exists(), command


def strangers_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> Path:
    """A module `unseen` below a folder; the file that its code makes when imported."""
    monkeypatch.setattr(trust, "_everything", False)
    monkeypatch.setenv("INFL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    folder, mark = tmp_path / place, tmp_path / "executed"
    folder.mkdir(parents=True)
    (folder / "unseen.py").write_text(TASK.format(mark=str(mark)))
    return mark


@pytest.mark.parametrize("place", ["runs/x", "runs/x/site-packages", "runs/x/dist-packages"])
def test_the_folder_of_a_stranger_is_never_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Neither for what claims to be installed there, nor for other modules or announced tasks."""
    mark = strangers_task(tmp_path, monkeypatch, place)
    announced = tmp_path / place / "theirs-1.dist-info"
    announced.mkdir()
    (announced / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (announced / "entry_points.txt").write_text(
        "[influence_jobs.tasks]\nunseen:Theirs = unseen:Theirs\n"
    )
    before = [*sys.path]
    for _ in range(2):
        with pytest.raises(UntrustedCode, match=r"unseen\.py, which you have not named"):
            task_class(TaskSpec(name="unseen:Theirs", data="", folder=place))
    assert sys.path == before
    assert not mark.exists()


def test_a_trusted_task_brings_no_folder_that_it_does_not_lie_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = strangers_task(tmp_path, monkeypatch, "runs/x")
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "task_seen.py").write_text(TASK.format(mark=str(tmp_path / "fine")))
    task_class("task_seen:Theirs")
    monkeypatch.delitem(sys.modules, "task_seen")
    task_class(TaskSpec(name="task_seen:Theirs", data="", folder="runs/x"))
    assert "runs/x" not in sys.path
    assert not mark.exists()


@pytest.mark.parametrize("own_init", [False, True])
def test_a_module_below_a_known_package_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_init: bool
) -> None:
    """Runs may lie in the package; a link to a known file does not make what is around it known."""
    package = f"package_seen_{own_init}".lower()
    mark = strangers_task(tmp_path, monkeypatch, f"{package}/runs/x")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, text in (("__init__", ""), ("tasks", TASK.format(mark=str(tmp_path / "fine")))):
        (tmp_path / package / f"{name}.py").write_text(text)
    if own_init:
        unseen = tmp_path / package / "runs/x/unseen.py"
        unseen.rename(unseen.with_name("__init__.py"))
        unseen.symlink_to(tmp_path / package / "tasks.py")
    task_class(f"{package}.tasks:Theirs")
    theirs = TaskSpec(name=f"{package}.runs.x.unseen:Theirs", data="")
    with pytest.raises(UntrustedCode, match="which you have not named on this machine"):
        task_class(theirs)
    for name in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UntrustedCode):
        task_class(theirs)
    assert not mark.exists()
    assert task_class(TaskSpec(name=f"{package}.tasks:Theirs", data="")).__name__ == "Theirs"


@pytest.mark.parametrize("planted", ["report", "report/report.html"])
def test_a_report_is_not_written_through_a_link(
    infl: Infl, strangers: tuple[str, Path], tmp_path: Path, planted: str
) -> None:
    run, _ = strangers
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    link = tmp_path / "runs" / run / planted
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside if planted == "report" else outside / "file")
    found = infl("report", run)
    assert found.code == 2
    assert f"{link} may lead out of its folder" in found.err
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "mine"
    assert infl("report", run, "--out", outside).code == 0
    assert (outside / "report.html").is_file()


def test_a_pipe_does_not_hold_the_report(infl: Infl, strangers: tuple[str, Path]) -> None:
    run, _ = strangers
    folder = Path("runs", run, "report")
    folder.mkdir()
    os.mkfifo(folder / "report.html")
    assert infl("report", run).code == 0
    assert (folder / "report.html").is_file()


def test_a_run_may_be_a_link_to_another_disk(
    infl: Infl, strangers: tuple[str, Path], tmp_path: Path
) -> None:
    run, _ = strangers
    (tmp_path / "runs" / run).rename(tmp_path / "disk")
    (tmp_path / "runs" / run).symlink_to(tmp_path / "disk")
    assert run in infl("runs").out
    for command in ("status", "verify", "top", "report"):
        found = infl(command, run)
        assert found.code == 0, found.err
    assert (tmp_path / "disk/report/report.html").is_file()


def test_a_run_whose_code_is_elsewhere_is_shown(
    infl: Infl, strangers: tuple[str, Path], tmp_path: Path
) -> None:
    run, _ = strangers
    (tmp_path / "payload.py").unlink()
    found = infl("report", run)
    assert found.code == 0, found.err
    told = "task 'payload:Theirs' of this run is not here: put the file of its module payload to"
    assert told in found.err
    again = infl("top", run, "--png", "sheet.png")
    assert again.code == 2
    assert told in again.err


@pytest.mark.slow
def test_a_run_of_a_script_is_shown(
    infl: Infl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class is known in that script alone."""
    script = tmp_path / "script.py"
    script.write_text(
        TASK.format(mark=str(tmp_path / "mark"))
        + "import influence_jobs\n"
        + "influence_jobs.submit('influence', task=Theirs, epochs=1, test=0, solver='cg')\n"
    )
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(trust, "_everything", False)
    found = infl("report", "influence")
    assert found.code == 0, found.err
    assert "task '__main__:Theirs' of this run was defined in a script or notebook" in found.err
