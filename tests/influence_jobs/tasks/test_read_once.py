"""An object of a task is asked for its data once, whoever asks."""

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import DigitsTask

import influence_jobs
from influence_jobs.errors import DataError
from influence_jobs.tasks.base import Draw
from influence_jobs.training.changes import Changes


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[DigitsTask]]:
    """The objects whose methods were called, by the method's name."""
    found: dict[str, list[DigitsTask]] = {"train_data": [], "test_data": []}

    def counted(name: str) -> Any:
        plain = getattr(DigitsTask, name)

        def method(self: DigitsTask) -> Any:
            found[name].append(self)
            return plain(self)

        return method

    for name in found:
        monkeypatch.setattr(DigitsTask, name, counted(name))
    return found


def test_in_a_whole_influence_run(asked: dict[str, list[DigitsTask]], tmp_path: Path) -> None:
    run = influence_jobs.submit(
        "influence", task=DigitsTask, test=[3, 7], epochs=1, layer="head", curvature_samples=300,
        damping=0.5, runs=str(tmp_path), quiet=True,
    )  # fmt: skip
    assert run["scores"].shape == (2, 1500)
    for objects in asked.values():
        assert objects
        assert set(Counter(map(id, objects)).values()) == {1}


def test_by_hooks_of_the_users_own_and_by_parents(asked: dict[str, list[DigitsTask]]) -> None:
    class Half(DigitsTask):
        def train_data(self) -> Any:
            self.halved = getattr(self, "halved", 0) + 1
            return torch.utils.data.Subset(super().train_data(), range(700))

        def batch(self, ids: torch.Tensor, draw: Draw) -> Any:
            return torch.stack([self.train_data()[int(i)][0] for i in ids]), ids % 10

    task = Half()
    for _ in range(3):
        task.batch(torch.arange(4), Draw(0))
        Changes().check(task)
    assert len(task.train_data()) == 700
    assert (task.halved, len(asked["train_data"])) == (1, 1)


def test_a_copy_reads_its_own_data() -> None:
    task = DigitsTask(width=4)
    first = task.train_data()
    assert task.train_data() is first
    for other in (copy.copy(task), copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert other.width == 4
        assert other.given == {"width": 4}
        assert other.train_data() is not first
        assert torch.equal(other.train_data().tensors[0], first.tensors[0])


def test_a_failure_is_not_kept() -> None:
    answers = iter([OSError("not there yet")])

    class Later(DigitsTask):
        def train_data(self) -> Any:
            for error in answers:
                raise error
            return super().train_data()

    task = Later()
    told = r"Later.train_data\(\) failed: OSError: not there yet \(.*test_read_once.py, line \d+\)"
    with pytest.raises(DataError, match=told):
        task.train_data()
    assert len(task.train_data()) == 1500
