"""The user's words become a spec that means the same on every machine."""

import sys
from pathlib import Path
from typing import Any

import pytest

from influence_jobs.datasets import mnist
from influence_jobs.datasets.mnist import default_data_dir
from influence_jobs.errors import DataError, SpecError
from influence_jobs.kinds.train.request import TrainRequest
from influence_jobs.requests.subject import task_of
from influence_jobs.specs.base import TaskSpec
from influence_jobs.tasks import mnist as mnist_task
from influence_jobs.tasks.ffdnet import FFDNetTask
from influence_jobs.tasks.registry import task_class

OWN = """
from digits import DigitsTask

class Own(DigitsTask):
    paths = frozenset({"folder"})

    def __init__(self, *, folder="standard", scale=1.0, table={}):
        super().__init__()

class Plain(Own):
    def __init__(self, *, folder="standard", scale=1.0):
        super().__init__()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with a user's tasks, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_task.py").write_text(OWN.replace("{}", "{1: 2}"))
    monkeypatch.delitem(sys.modules, "own_task", raising=False)
    return "own_task"


def request(name: str, **given: Any) -> TaskSpec:
    return task_of(TrainRequest.of({"task": name, **given}), print)[0]


def test_workers_are_told_where_data_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist_task, "fetch_mnist", lambda _folder, say: None)
    monkeypatch.setattr(mnist_task.MnistTask, "fingerprint", lambda _self: "data")
    for data in ("train_data", "test_data"):
        monkeypatch.setattr(mnist_task.MnistTask, data, lambda _self: range(3))
    monkeypatch.setenv("INFL_DATA", "")  # the same as none
    assert request("mnist").paths == {"data_dir": str(default_data_dir())}
    monkeypatch.setenv("INFL_DATA", str(tmp_path / "data"))
    assert request("mnist").paths == {"data_dir": str(tmp_path / "data")}
    assert request("mnist", data_dir="/given").paths == {"data_dir": "/given"}


def test_only_words_of_the_task_itself_are_no_paths(own: str, tmp_path: Path) -> None:
    assert request(f"{own}:Plain", folder="standard").paths == {"folder": "standard"}
    assert request(f"{own}:Plain", folder="samples").paths == {"folder": str(tmp_path / "samples")}
    (tmp_path / "standard").mkdir()  # workers have another working directory
    for given in ({}, {"folder": "standard"}):
        assert request(f"{own}:Plain", **given).paths == {"folder": str(tmp_path / "standard")}


def test_options_that_are_no_scalars(own: str) -> None:
    with pytest.raises(SpecError, match=r"^option table of task own_task:Own is \{1: 2\}: it must"):
        request(f"{own}:Own")
    with pytest.raises(SpecError, match=r"^option scale of task own_task:Plain is nan"):
        request(f"{own}:Plain", scale=float("nan"))


def test_files_skipped_in_training_are_those_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = str(tmp_path / "a")
    trained = TaskSpec(name="ffdnet", options={"skip": ("x",)}, paths={"images": images}, data="")
    kept = {**trained.options, **trained.paths}
    for same in ({}, {"images": "a"}, {"images": images}):
        assert FFDNetTask.inherit(kept, same)["skip"] == ("x",)
    assert "skip" not in FFDNetTask.inherit(kept, {"images": "b"})


def test_files_of_the_working_directory_shadow_nothing(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "installed"
    installed.mkdir()
    (installed / "own_task.py").write_text(OWN)
    sys.path.append(str(installed))
    task_class("ffdnet")
    assert str(tmp_path) not in sys.path
    module = sys.modules[task_class(f"{own}:Own").__module__]
    assert module.__file__ == str(installed / "own_task.py")
    assert sys.path[-1] == str(tmp_path)

    (tmp_path / "colorsys.py").write_text("raise SystemExit('shadowed')")
    mnist._run(["-c", "import colorsys"], 60)
    with pytest.raises(DataError, match="reached"):
        mnist._run(["-c", "import colorsys, sys; sys.exit('reached')"], 60)


def test_a_checkpoint_of_other_code_or_data_is_told(own: str) -> None:
    trained = request(f"{own}:Plain")
    asked = TrainRequest.of({"task": f"{own}:Plain"})

    def said(asked: TrainRequest = asked, **changed: Any) -> list[str]:
        lines: list[str] = []
        task_of(asked, lines.append, trained=trained.model_copy(update=changed))
        return lines

    name = f"{own}:Plain"
    assert said() == []
    assert said(code="0" * 16) == [
        f"the code of task {name} changed since its checkpoint was trained"
    ]
    assert said(data="3 samples") == [
        f"task {name} has other data or code than its checkpoint was trained with"
    ]
    options: dict[str, Any] = {"options": {"scale": 2.0}, "paths": {"folder": "/elsewhere"}}
    taken = f"task {name} has the options that its checkpoint was trained with: --scale 2.0"
    assert said(**options) == [taken]
    assert said(TrainRequest.of({"task": name, "scale": 2}), **options) == []
