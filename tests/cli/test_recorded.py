"""A training that a `Recorder` was in becomes a run, and all that runs are good for."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

import influence_jobs
from influence_jobs.store.run import Run
from influence_jobs.tasks.registry import task_class

from .test_own_training import TASKS

Infl = Callable[..., Any]
LAYERS = ("0", "2")
TRAIN = ("submit", "train", "--task", "my_tasks.py:Toy", "--local")


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> influence_jobs.Recorder:
    """Of a loop of three epochs, in the folder `recorded`."""
    (tmp_path / "my_tasks.py").write_text(TASKS)
    monkeypatch.delitem(sys.modules, "my_tasks", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    task: Any = task_class(f"{tmp_path}/my_tasks.py:Toy")()
    x, y = task.train_data().tensors
    model = task.model()
    optimizer = torch.optim.RMSprop(model.parameters(), 0.01)
    found = influence_jobs.Recorder(model, 60, layers=LAYERS, folder=tmp_path / "recorded")
    for _ in range(3):
        for ids in torch.randperm(60).split(7):
            optimizer.zero_grad()
            F.cross_entropy(model(x[ids]), y[ids]).backward()
            found.step(ids)
            optimizer.step()
        found.end_epoch()
    return found


def test_its_weights_and_norms_are_those_of_a_run(
    infl: Infl, tmp_path: Path, recorder: influence_jobs.Recorder
) -> None:
    found = infl(*TRAIN, "--recorded", "recorded", "--json")
    assert found.code == 0, found.err
    run = Run.open(str(tmp_path / "runs"), found.json["run"])
    for layer, sums in recorder.norms.sums.items():
        assert np.array_equal(run.read_rows(f"norms/{layer}", 0, 60), sums)
    weights = torch.load(tmp_path / "runs" / run.id / "checkpoints/epoch-0003.pt")
    assert torch.equal(weights["2.bias"], recorder.model.state_dict()["2.bias"])
    rows = pq.read_table(tmp_path / "runs" / run.id / "tables/metrics.parquet").to_pylist()
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[0]["train_loss"] > rows[2]["train_loss"] > 0
    assert {name for name, _ in run.spec.request_in_words()} == {
        "task", "data", "trainer", "recorded", "epochs", "save epochs", "norm layers",
        "norm reduction", "norm skip epochs",
    }  # fmt: skip
    assert infl("verify", run.id).code == 0
    assert infl("report", run.id, "--out", "page").code == 0
    assert infl("top", run.id, "--layer", "module:2").code == 0
    again = infl(*TRAIN, "--recorded", tmp_path / "recorded")
    assert "is already done" in again.err
    test = ("--test", 2, "--local")
    assert infl("submit", "attribution", "--norms", run.id, "--layer", "module:0", *test).code == 0
    replayed = infl("submit", "grad-norms", "--layer", "all", "--checkpoint", f"{run.id}@all",
                    "--local")  # fmt: skip
    assert replayed.code == 0, replayed.err
    file = infl("submit", "influence", "--task", "my_tasks.py:Toy", "--checkpoint",
                "recorded/epoch-0002.pt", "--damping", 1, *test)  # fmt: skip
    assert file.code == 0, file.err
    # It cannot be repeated: models are retrained by the task's own recipe, which is said.
    ablation = infl("submit", "ablation", "--checkpoint", run.id, "--by", "loss", "--k", 5,
                    "--epochs", 1, *test)  # fmt: skip
    assert ablation.code == 0, ablation.err
    said = (
        f"it is not known how {run.id}, epoch 3 was trained: scores are of its weights, and models"
    )
    assert said in ablation.err
    assert "(1 epochs of sgd, lr 0.003, batches of 8; --epochs and --preset" in ablation.err


def test_epochs_that_do_not_count_have_no_norms(
    infl: Infl, tmp_path: Path, recorder: influence_jobs.Recorder
) -> None:
    recorder.epoch, recorder._saved = 0, ()
    recorder.end_epoch()
    found = infl(*TRAIN, "--recorded", "recorded", "--json")
    assert found.code == 0, found.err
    spec: Any = Run.open(str(tmp_path / "runs"), found.json["run"]).spec
    assert (spec.epochs, spec.norm_layers) == (1, ())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--lr", 1), "--lr has no meaning with --recorded: leave it out"),
        (("--norms-layer", 1), "--norms-layer has no meaning with --recorded"),
        (("--recorded", "nowhere"), "nowhere has no recording of influence_jobs.Recorder, or not"),
        (("--recorded", "half"), "half has no recording of influence_jobs.Recorder, or not all"),
        (("--recorded", "other"), "of 61 samples, and task my_tasks:Toy has 60: name a task with"),
        (("--recorded", "sparse"), "lacks the weights after its last epoch (3): let the recorder"),
        (("--recorded", "deep"), "epoch-0003.pt does not fit Sequential: it has besides deep: "),
    ],
)
def test_what_is_no_recording_of_the_task_is_refused(
    infl: Infl, tmp_path: Path, recorder: influence_jobs.Recorder, words: Any, told: str
) -> None:
    for folder in ("half", "other", "sparse", "deep"):
        (tmp_path / folder).mkdir()
        for path in (tmp_path / "recorded").iterdir():
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "half/epoch-0002.pt").unlink()
    for folder, change in (("other", {"num_samples": 61}), ("sparse", {"saved": [1, 2]})):
        file = tmp_path / folder / "recorded.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    weights = recorder.model.state_dict() | {"deep": torch.zeros(1)}
    torch.save(weights, tmp_path / "deep/epoch-0003.pt")
    found = infl(*TRAIN, "--recorded", "recorded", *words)
    assert found.code == 2
    assert told in found.err
    assert not (tmp_path / "runs").exists()


def test_a_recording_that_changed_is_not_taken(
    infl: Infl, tmp_path: Path, recorder: influence_jobs.Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from influence_jobs.kinds.train import job

    monkeypatch.setattr(job, "read_recording", lambda folder: (None, "0" * 64))
    found = infl(*TRAIN, "--recorded", "recorded")
    assert found.code == 2
    assert "has changed since the run was submitted: submit it again" in found.err
