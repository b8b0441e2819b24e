"""Tasks named by their file: the same run wherever it lies, and errors of the user's code."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infl_cluster import head as head_module
from infl_cluster import launch, ray_job
from infl_cluster.how import How
from influence_jobs import devices
from influence_jobs.errors import SpecError
from influence_jobs.kinds.train.request import TrainRequest
from influence_jobs.store.run import Run
from influence_jobs.tasks.registry import name_of, task_class

Infl = Callable[..., Any]

TOY = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs import Task


class Toy(Task):
    def model(self):
        return nn.Sequential(nn.Linear(4, 3))

    def train_data(self):
        rows = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
        return TensorDataset(rows, torch.arange(12) % 3)

    def losses(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


@pytest.fixture(autouse=True)
def _modules_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("toy_file", "toy_package", "toy_package.inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def _forget() -> None:
    """As another process would begin."""
    sys.modules.pop("toy_file", None)
    sys.path[:] = [p for p in sys.path if "elsewhere" not in p]


def test_one_run_from_anywhere(infl: Infl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "toy_file.py").write_text(TOY)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ("submit", "grad-norms", "--layer", "all", "--epochs", 1, "--local", "--json")
    root = ("--runs", tmp_path / "runs")
    first = infl(*words, *root, "--task", "elsewhere/toy_file.py:Toy")
    assert first.code == 0, first.err
    run = Run.open(str(tmp_path / "runs"), first.json["run"])
    assert (run.spec.task.name, run.spec.task.folder) == ("toy_file:Toy", str(folder))
    for name in (f"{folder}/toy_file.py:Toy", "~/elsewhere/toy_file.py:Toy"):
        _forget()
        again = infl(*words, *root, "--task", name)
        assert "is already done" in again.err
        assert again.json["run"] == run.id
    # The run knows where its task lies.
    for command in (("top", run.id, "--k", 2), ("report", run.id, "--out", "out")):
        _forget()
        answer = infl(*command)
        assert answer.code == 0, answer.err
    _forget()
    monkeypatch.chdir(folder)
    for name in ("toy_file.py:Toy", "toy_file:Toy", "./toy_file.py:Toy"):
        again = infl("submit", "train", "--task", name, "--epochs", 1, "--local", "--json", *root)
        assert "is already done" in again.err


def test_its_options_are_in_the_help(infl: Infl, tmp_path: Path) -> None:
    (tmp_path / "toy_file.py").write_text(
        TOY + "    def __init__(self, *, rows_of_toy: int = 12):\n        pass\n"
    )
    shown = infl("submit", "train", "--task", "toy_file.py:Toy", "--help")
    assert "--rows-of-toy" in shown.out


def test_a_module_of_a_package_is_imported_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "toy_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "inner.py").write_text("from .sizes import ROWS\n" + TOY)
    (package / "sizes.py").write_text("ROWS = 3\n")
    name = f"{package}/inner.py:Toy"
    assert name_of(name) == "toy_package.inner:Toy"
    assert task_class(name).__module__ == "toy_package.inner"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch\nclass Toy(:\n    pass\n", "SyntaxError: invalid syntax ({file}, line 2)"),
        ("x = 1\ny = {{}}['a']\n", "KeyError: 'a' ({file}, line 2)"),
        (
            "import nothing_at_all\n",
            "ModuleNotFoundError: No module named 'nothing_at_all' ({file}",
        ),
        ("import torch\ntorch.zeros(2) @ torch.zeros(3)\n", "inconsistent tensor size, "),
        ("import torch\ntorch.zeros(2) @ torch.zeros(3)\n", "({file}, line 2)"),
        ("raise SystemExit(3)\n", "SystemExit: 3 ({file}, line 1)"),
        (TOY, "{file} has no Nix; tasks in it: Toy"),
        ("Nix = 3\n", "task 'toy_file.py:Nix' is not a subclass of influence_jobs.Task"),
    ],
)
def test_what_is_wrong_with_the_file_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy_file.py").write_text(text.replace("{{}}", "{}"))
    with pytest.raises(SpecError) as caught:
        task_class("toy_file.py:Nix")
    assert expected.format(file=tmp_path / "toy_file.py") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_another_module_hides(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(TOY)
    with pytest.raises(SpecError, match=r"there is another module json .*; rename the file"):
        task_class(f"{tmp_path}/json.py:Toy")
    with pytest.raises(SpecError, match=r"there is no file .*nix.py"):
        task_class(f"{tmp_path}/nix.py:Toy")
    with pytest.raises(SpecError, match=r"name its class too, as .*json.py:Class"):
        task_class(f"{tmp_path}{os.sep}json.py")


def test_workers_are_told_where_the_file_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "toy_file.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    request = TrainRequest.of({"task": "elsewhere/toy_file.py:Toy"})
    run = Run.create(str(tmp_path / "runs"), request.specs("", print)[0])
    told: dict[str, Any] = {}

    class Client:
        def submit(self, argv: Any, *, env: dict[str, str], **others: Any) -> None:
            told.update(env, device=argv[argv.index("--device") + 1])

    head = SimpleNamespace(client=Client, dashboard_url="", token_path=tmp_path / "token")
    monkeypatch.setattr(head_module, "ensure_head", lambda **_: head)
    monkeypatch.setattr(ray_job, "job_watcher", lambda job: None)
    monkeypatch.setattr(devices, "has_cuda", lambda: True)  # which the workers may not have
    launch._submit(run, How(), print)
    assert told["device"] == "auto"
    assert told["PYTHONPATH"].split(os.pathsep)[:2] == [str(folder), str(tmp_path)]


def test_a_package_that_comes_later_announces_its_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from digits import DigitsTask

    with pytest.raises(SpecError, match=r"^unknown task 'their-digits': choose ffdnet, "):
        task_class("their-digits")
    info = tmp_path / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[influence_jobs.tasks]\ntheir-digits = digits:DigitsTask\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert task_class("their-digits") is DigitsTask
