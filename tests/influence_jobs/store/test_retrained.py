"""Weights of retrained variants: readable when complete, missing when damaged."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from influence_jobs.errors import DataError
from influence_jobs.kinds.train.spec import TrainSpec
from influence_jobs.specs.base import TaskSpec
from influence_jobs.store.documents import Entry
from influence_jobs.store.find import run_ids
from influence_jobs.store.manifest import Manifest
from influence_jobs.store.retrained import Retrained, variant_key
from influence_jobs.store.run import now
from influence_jobs.tasks.base import Task

RECIPE = TrainSpec(task=TaskSpec(name="some:Task", data="9 samples"))
KEY = variant_key(0, b"", b"", b"")


class Rows(Task):
    """Rows of numbers that begin at `first`."""

    first = 0.0

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def train_data(self) -> TensorDataset:
        return TensorDataset(torch.arange(9.0) + self.first)

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        raise NotImplementedError


def retrained(root: Path, **fields) -> Retrained:
    return Retrained(str(root), RECIPE.model_copy(update=fields), Rows)


def test_what_was_written_is_read_by_all_of_the_same_recipe_alone(tmp_path: Path) -> None:
    stack = torch.randn(1000, 3)
    retrained(tmp_path).write(KEY, {"weight": stack[7]})
    found = retrained(tmp_path).read(KEY)
    assert found is not None
    torch.testing.assert_close(found["weight"], stack[7], rtol=0, atol=0)
    assert retrained(tmp_path, lr=0.5).read(KEY) is None
    assert retrained(tmp_path).read(variant_key(1, b"", b"", b"")) is None
    assert run_ids(str(tmp_path)) == []
    (file,) = tmp_path.glob("*/checkpoints/*.pt")
    assert file.stat().st_size < 4000  # one row, not the whole stack


@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: f.write_bytes(b"x")])
def test_damaged_weights_count_as_missing(tmp_path: Path, damage) -> None:
    retrained(tmp_path).write(KEY, {"weight": torch.zeros(3)})
    (file,) = tmp_path.glob("*/checkpoints/*.pt")
    damage(file)
    assert retrained(tmp_path).read(KEY) is None


def test_two_that_write_the_same_variant_at_once_leave_a_whole_one(
    tmp_path: Path, monkeypatch
) -> None:
    one, other = retrained(tmp_path), retrained(tmp_path)
    write = Manifest.write

    def late(self: Manifest, entry: Entry) -> None:
        monkeypatch.setattr(Manifest, "write", write)
        other.write(KEY, {"weight": torch.ones(3)})  # between the first one's weights and its entry
        write(self, entry)

    monkeypatch.setattr(Manifest, "write", late)
    one.write(KEY, {"weight": torch.zeros(3)})
    found = retrained(tmp_path).read(KEY)
    assert found is not None
    assert found["weight"].tolist() in ([0, 0, 0], [1, 1, 1])


def test_only_old_halves_are_swept(tmp_path: Path) -> None:
    retrained(tmp_path).write(KEY, {"weight": torch.zeros(3)})
    (folder,) = tmp_path.glob("*/checkpoints")
    for name, age in (("old", 7200), ("new", 60)):
        half = folder / f"{name}.pt.0123.partial"
        half.write_bytes(b"ha")
        os.utime(half, (now() - age, now() - age))
    retrained(tmp_path).sweep()
    assert [path.name for path in folder.glob("*.partial")] == ["new.pt.0123.partial"]
    assert retrained(tmp_path).read(KEY) is not None


def test_weights_without_their_manifest_entry_are_not_believed(tmp_path: Path) -> None:
    retrained(tmp_path).write(KEY, {"weight": torch.zeros(3)})
    (entry,) = tmp_path.glob("*/manifest/*.json")
    entry.unlink()
    assert retrained(tmp_path).read(KEY) is None


def test_whatever_makes_another_training_makes_another_key() -> None:
    keys = {
        variant_key(seed, removed, relabelled, labels, masked)
        for seed in (0, 1)
        for removed in (b"", b"a")
        for relabelled in (b"", b"a")
        for labels in (b"", b"a")
        for masked in (b"", b"a")
    }
    assert len(keys) == 32
    assert variant_key(0, b"", b"", b"", b"") == KEY


def test_variants_of_other_data_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrained(tmp_path).write(KEY, {"weight": torch.zeros(3)})
    assert retrained(tmp_path).read(KEY) is not None
    monkeypatch.setattr(Rows, "first", 1.0)
    assert retrained(tmp_path).read(variant_key(1, b"", b"", b"")) is None
    with pytest.raises(
        DataError,
        match=r"^training sample 0 is not the one that the models of retrained-task-\w+ were "
        r"trained with \(9 of 9 training samples are compared\): restore the data, or delete that",
    ):
        retrained(tmp_path).read(KEY)


def test_variants_of_an_earlier_version_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their folder has no digests, and gets none from a later writer."""
    retrained(tmp_path).write(KEY, {"weight": torch.zeros(3)})
    (digests,) = tmp_path.glob("*/samples.json")
    digests.unlink()
    monkeypatch.setattr(Rows, "first", 1.0)
    retrained(tmp_path).write(variant_key(1, b"", b"", b""), {"weight": torch.zeros(3)})
    assert retrained(tmp_path).read(KEY) is not None
