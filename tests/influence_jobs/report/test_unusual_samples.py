"""Samples of several kinds on one page, columns with our names, and what cannot be shown."""

import io
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from influence_jobs.errors import SpecError
from influence_jobs.kinds import view_of
from influence_jobs.kinds.train.spec import TrainedCheckpoint
from influence_jobs.report.cells import all_columns, differs
from influence_jobs.report.commands import norms_of
from influence_jobs.report.html import environment
from influence_jobs.report.selection import table_file
from influence_jobs.store.run import Run, _like
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.seen import Text, Wave, content, content_of_test, contents
from influence_jobs.views.contact_sheet import Cell


def test_values_of_rows_are_plain() -> None:
    row = content({"a": np.float32(2), "b": torch.tensor([1, 2]), "c": np.array([0.5]), "d": "x"})
    assert row == {"a": 2.0, "b": [1, 2], "c": [0.5], "d": "x"}
    assert differs(row["b"], [1, 2]) == ""
    assert differs(row["b"], [1, 3]) == "differs"
    assert differs(float("nan"), float("nan")) == ""
    assert differs(2.0, 1.5) == "+0.5"


@pytest.mark.parametrize("shape", [(1, 16000), (16000, 1), (16000,), (2, 16000)])
def test_channels_of_a_sound_come_first_or_last(shape: tuple[int, ...]) -> None:
    sound = content((torch.zeros(shape, dtype=torch.bfloat16), 8000.0))
    assert isinstance(sound, Wave)
    assert sound.values.shape == (16000, 2 if shape[0] == 2 else 1)
    assert sound.seconds == 2
    assert sound.file()[:4] == b"RIFF"


@pytest.mark.parametrize(
    "value",
    [(np.zeros((100, 100)), 8000), (np.zeros(9), 0.5), Text([1, 2]), Text(["a"], ["b"])],  # type: ignore[list-item]
)
def test_what_cannot_be_shown_is_refused(value: object) -> None:
    with pytest.raises(SpecError, match=r"show\(\) gives"):
        content(value)


@pytest.mark.parametrize("others", [None, Text(["a"])])
def test_rows_and_others_stand_beside_each_other(others: Text | None) -> None:
    rows, mixed = [Cell({"a": 1}, ["7"], 7)], [Cell({"a": 1}, ["7"], 7), Cell(others, ["8"], 8)]
    assert all_columns(rows)
    assert not all_columns(mixed)
    page: Any = environment().get_template("pieces.html.j2").module
    assert "<table" in page.samples(rows)
    html = page.samples(mixed)
    assert "<table" not in html
    assert "7" in html and "8" in html


class Unseen(Task):
    """Its pictures are refused, or its data are gone: pages show what `describe` says."""

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(1, 1)

    def losses(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return model(batch).squeeze(1)

    def train_data(self) -> list[int]:
        return [0, 1]

    test_data = train_data

    def batch(self, ids: torch.Tensor, draw: Draw) -> Any:
        raise FileNotFoundError("gone")

    test_batch = batch


class Refused(Unseen):
    def pictures(self, ids: Any) -> Any:
        raise SpecError("no pictures of these")

    def test_picture(self, test: int) -> Any:
        raise SpecError("no picture of this")


@pytest.mark.parametrize("task", [Unseen, Refused])
def test_samples_without_pictures_are_shown_by_their_columns(task: type[Task]) -> None:
    columns: list[dict[str, Any]] = [{"a": 1, "b": 2}, {"text": "word"}]
    made = task()
    row, text = contents(made, np.arange(2), columns)
    assert row == {"a": 1, "b": 2}
    assert str(text) == "word"
    assert content_of_test(made, 1, columns[0]) == {"a": 1, "b": 2}


def test_our_columns_count_before_those_of_a_task(runs_of_all_kinds, tmp_path, asking) -> None:
    shutil.copytree(runs_of_all_kinds.influence.root, tmp_path / "runs")
    run = Run.open(str(tmp_path / "runs"), runs_of_all_kinds.influence.id)
    samples = run.read_table("samples")
    theirs = pa.array([77.0] * samples.num_rows)
    run.write_table("samples", samples.append_column("score", theirs).append_column("rank", theirs))
    largest = float(np.nanmax(run.array("scores")[0]))
    test = run.read_table("queries")["test"][0].as_py()
    page = asking(run).get("/query/samples.parquet", params={"test": test, "side": "helpful"})
    table = pq.read_table(io.BytesIO(page.content)).to_pylist()
    assert (table[0]["rank"], table[0]["score"]) == (1, pytest.approx(largest))
    top = view_of(run).top(1)["scores"]
    assert top[0]["score"] == pytest.approx(largest)


def test_blocks_of_a_table_change_no_value() -> None:
    first = pa.schema([("a", pa.bool_()), ("b", pa.string())])
    good = pa.table({"b": pa.nulls(2), "a": [True, False]})
    assert _like(good, first).to_pylist() == [{"a": True, "b": None}, {"a": False, "b": None}]
    for wrong in ({"a": [5], "b": ["x"]}, {"a": [True]}, {"a": [True], "b": ["x"], "c": [1]}):
        with pytest.raises(pa.ArrowInvalid):
            _like(pa.table(wrong), first)


def test_a_column_of_several_types_is_exported_as_text() -> None:
    rows: list[dict[str, Any]] = [{"a": 1, "b": 2}, {"a": "x", "b": None}, {"a": None, "b": 3}]
    table = pq.read_table(io.BytesIO(table_file(rows, "parquet", "t").body))
    assert table.to_pydict() == {"a": ["1", "x", None], "b": [2, None, 3]}


def test_a_command_names_the_epoch_of_the_weights(runs_of_all_kinds) -> None:
    weights = runs_of_all_kinds.influence.spec.s_tests[0].checkpoint
    train = weights.train.model_copy(update={"epochs": 3, "save_epochs": (1, 3)})
    asked = {}
    for epoch in (1, 3):
        point = TrainedCheckpoint(train=train, epoch=epoch)
        asked[epoch] = norms_of([SimpleNamespace(spec=point, root="runs")])  # type: ignore[list-item]
    assert f"--checkpoint {train.run_id}@1 --layer all" in asked[1]
    assert f"--checkpoint {train.run_id} --layer all" in asked[3]
