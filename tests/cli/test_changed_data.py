"""Data that changed where no fingerprint sees it: old results are not taken for those of today."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from influence_jobs.store.run import Run
from influence_jobs.tasks.registry import task_class

from .rows_in_file import write

Infl = Callable[..., Any]

TASK = f"{Path(__file__).with_name('rows_in_file.py')}:Rows"
AT = ("--task", TASK, "--path", "rows.pt", "--epochs", 1, "--local")
OTHER = re.compile(
    r"^error: (?P<what>training|test) sample \d+ is not the one that (?P<run>[\w-]+) was begun "
    r"with \(64 of 200 training samples( and all test samples of its queries)? are compared\): "
    r"restore the data, or delete the folders? of (?P<runs>[\w, -]+) and submit again$"
)
WITH_QUERIES = {
    "s-test": (),
    "influence": (),
    "unrolled": (),
    "attribution": ("--layer", 1),
    "baseline": ("--method", "nearest"),
    "gradient-scores": (),
    "ablation": ("--by", "random", "--k", 5, "--mode", "remove", "--seeds", 1),
    "lds": ("--by", "dot-product", "--subsets", 3),
    "stability": ("--by", "loss", "--retrainings", 1),
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    write(tmp_path / "rows.pt")
    return tmp_path / "rows.pt"


def refused(answer: Any) -> re.Match[str]:
    """The one line that says which sample is another one."""
    assert answer.code == 2
    found = OTHER.match(answer.err.splitlines()[-1])
    assert found, answer.err
    assert "Traceback" not in answer.err
    return found


@pytest.mark.parametrize("kind", WITH_QUERIES)
def test_scores_of_other_test_data_are_not_taken_for_those_of_today(
    infl: Infl, tmp_path: Path, rows: Path, kind: str
) -> None:
    words = ("submit", kind, *AT, "--test", 0, *WITH_QUERIES[kind])
    done = infl(*words)
    assert done.code == 0, done.err
    write(rows, test=1.0)
    found = refused(infl(*words))
    assert found["what"] == "test"
    write(rows)
    assert "is already done" in infl(*words).err
    write(rows, test=1.0)
    for run in found["runs"].split(", "):
        shutil.rmtree(tmp_path / "runs" / run)
    again = infl(*words)
    assert again.code == 0, again.err
    assert "is already done" not in again.err


def test_a_run_does_not_take_vectors_of_other_test_data(
    infl: Infl, tmp_path: Path, rows: Path
) -> None:
    words = (*AT, "--test", 0, "--solver", "identity")
    solved = infl("submit", "s-test", *words, "--json").json["run"]
    write(rows, test=1.0)
    answer = infl("submit", "influence", *words)
    assert refused(answer)["runs"] == solved
    shutil.rmtree(tmp_path / "runs" / solved)
    found = infl("submit", "influence", *words, "--json").json["run"]
    alone = infl("submit", "influence", *words, "--runs", "alone", "--json").json["run"]
    assert alone == found
    one, other = (Run.open(root, found).read_rows("scores", 0, 200) for root in ("runs", "alone"))
    np.testing.assert_array_equal(one, other)


def test_scores_of_training_rows_that_changed_are_refused(
    infl: Infl, tmp_path: Path, rows: Path
) -> None:
    """Which have the same fingerprint, and so the same run ids."""
    words = ("submit", "influence", *AT, "--test", 0, "--solver", "identity")
    done = infl(*words, "--json").json["run"]
    write(rows, train=1.0)
    found = refused(infl(*words))
    assert (found["what"], found["run"]) == ("training", done)
    runs = found["runs"].split(", ")
    assert sorted(name.partition("-rows")[0] for name in runs) == ["influence", "s-test", "train"]
    # So is a new run of a model that was trained on them, and the end of `infl resume`.
    norms = refused(infl("submit", "grad-norms", *AT, "--layer", 1))
    assert norms["run"].startswith("train-rows")
    assert refused(infl("resume", done, "--local"))["run"] == done
    for run in runs:
        shutil.rmtree(tmp_path / "runs" / run)
    assert infl(*words).code == 0


def test_models_that_were_retrained_on_other_rows_are_refused(
    infl: Infl, tmp_path: Path, rows: Path
) -> None:
    words = ("submit", "lds", *AT, "--test", 0, *WITH_QUERIES["lds"])
    assert infl(*words).code == 0
    write(rows, train=1.0)
    for run in refused(infl(*words))["runs"].split(", "):
        shutil.rmtree(tmp_path / "runs" / run)
    answer = infl(*words)
    assert answer.code == 2
    (folder,) = (path.name for path in (tmp_path / "runs").glob("retrained-*"))
    assert f"is not the one that the models of {folder} were trained with (64 of 200" in answer.err
    shutil.rmtree(tmp_path / "runs" / folder)
    assert infl(*words).code == 0


def test_scores_that_see_samples_in_another_way_share_retrained_models(
    infl: Infl, tmp_path: Path, rows: Path
) -> None:
    at = (word if word != TASK else TASK.replace(":Rows", ":Moved") for word in AT)
    words = ("submit", "lds", *at, "--test", 0, *WITH_QUERIES["lds"])
    for shift in (0, 1):
        answer = infl(*words, "--shift", shift)
        assert answer.code == 0, answer.err
    assert len([*(tmp_path / "runs").glob("lds-*")]) == 2
    assert len([*(tmp_path / "runs").glob("retrained-*/checkpoints/*")]) == 3


@pytest.mark.parametrize("kind", ["train", "influence"])
def test_runs_of_earlier_versions_are_reused(
    infl: Infl, tmp_path: Path, rows: Path, kind: str
) -> None:
    """Nothing is known of their samples."""
    of = ("--test", 0, "--solver", "identity") if kind == "influence" else ()
    words = ("submit", kind, *AT, *of)
    assert infl(*words).code == 0
    for file in (tmp_path / "runs").glob("*/plan.json"):
        plan = json.loads(file.read_text())
        del plan["samples"]
        file.write_text(json.dumps(plan))
    write(rows, train=1.0, test=1.0)
    assert "is already done" in infl(*words).err
    answer = infl("submit", "influence", *AT, "--test", 0, "--solver", "identity", "--seed", 1)
    assert answer.code == 0, answer.err


def test_a_checkpoint_of_data_that_changed_in_the_open_goes_on(
    infl: Infl, tmp_path: Path, rows: Path
) -> None:
    """Of another fingerprint: the run says so, and has another id."""
    trained = infl("submit", "train", *AT, "--json").json["run"]
    shutil.move(rows, tmp_path / "moved.pt")
    write(rows, train=1.0, test=1.0)  # what lies at the old place does not matter
    words = ("submit", "grad-norms", "--checkpoint", trained, "--layer", 1, "--local")
    assert infl(*words, "--path", "moved.pt").code == 0
    write(rows)
    saved = rows.read_bytes()
    _other_fingerprint(rows)
    assert rows.read_bytes() != saved
    answer = infl(*words, "--path", "rows.pt")
    assert answer.code == 0, answer.err
    assert "has other data or code than its checkpoint was trained with" in answer.err


def _other_fingerprint(file: Path) -> None:
    found = torch.load(file)
    found["train"][0][:] += 1
    torch.save(found, file)


def test_results_are_there_where_the_data_are_not(infl: Infl, rows: Path) -> None:
    done = infl("submit", "train", *AT, "--json").json["run"]
    rows.unlink()
    assert "is already done" in infl("resume", done, "--local").err


def test_test_samples_that_are_others_each_time_are_told_as_that(
    infl: Infl, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = lambda *_: (torch.rand(1, 4), torch.tensor([0]))
    monkeypatch.setattr(task_class(TASK), "test_batch", other)
    answer = infl("submit", "s-test", *AT, "--test", 0, "--solver", "identity")
    assert answer.code == 2
    assert (
        "the task gives different numbers each time a test sample is fetched, so no" in answer.err
    )
