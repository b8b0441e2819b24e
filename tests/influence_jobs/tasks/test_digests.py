"""Digests of samples: equal wherever the same numbers are fetched, and other ones else."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from influence_jobs.errors import DataError
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.digests import (
    SAMPLES,
    digest_of,
    digests_of,
    first_other,
    some_samples,
    training_sample,
)
from influence_jobs.tasks.placement import converted


class Rows(Task):
    """A thousand rows in one dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        values = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        self._values = values.to(dtype)

    def model(self) -> nn.Module:
        return nn.Linear(3, 1).to(self._values.dtype)

    def train_data(self) -> TensorDataset:
        return TensorDataset(self._values)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        found: Tensor = model(batch[0])[:, 0]
        return found


def kept(task: Task) -> dict[str, str]:
    return digests_of("training", some_samples(task, 7), training_sample(task))


def test_samples_are_chosen_by_the_seed_over_all() -> None:
    chosen = some_samples(Rows(), 7)
    assert chosen == sorted(set(chosen)) == some_samples(Rows(), 7)
    assert len(chosen) == SAMPLES
    assert chosen[0] < 100
    assert chosen[-1] > 900
    assert chosen != some_samples(Rows(), 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_they_are_of_the_samples_as_the_task_gives_them(dtype: torch.dtype) -> None:
    """Whatever the model and its samples are converted to for a computation."""
    task = Rows(dtype)
    before = kept(task)
    model, fitting = converted(task, torch.device("cpu"), torch.float64)
    batch = task.batch(torch.arange(4), Draw(0))
    task.losses(model, fitting(batch))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert kept(Rows(dtype)) == kept(task) == before
    finally:
        torch.set_num_threads(threads)
    assert first_other("training", before, training_sample(task)) is None
    if dtype != torch.float32:
        assert set(before.values()).isdisjoint(kept(Rows()).values())


def test_every_bit_counts() -> None:
    task = Rows()
    before, row = kept(task), some_samples(task, 7)[40]
    task._values[row, 2] = torch.nextafter(task._values[row, 2], torch.tensor(9.0))
    assert first_other("training", before, training_sample(task)) == f"training sample {row}"


@pytest.mark.parametrize(
    "content",
    [
        "(torch.arange(3.0), {'text': ['a', 'b'], 'n': 3})",
        "(torch.eye(3).to_sparse(), torch.tensor(2.0, requires_grad=True))",
        "(np.array(['a', None], dtype=object), np.float32(1))",
        "(torch.tensor([1 + 2j]).conj(), [object(), len, lambda: 0])",
    ],
)
def test_they_are_the_same_in_every_process(content: str) -> None:
    """Also of what shows its address in place of its contents."""
    code = f"import numpy as np, torch; content = {content}"
    of = "from influence_jobs.tasks.digests import digest_of; print(digest_of(content))"
    other = subprocess.run(
        [sys.executable, "-c", f"{code}; {of}"], capture_output=True, text=True, check=True
    )
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    assert other.stdout.strip() == digest_of(names["content"])


def test_contents_are_told_apart() -> None:
    contents = [torch.zeros(2), torch.zeros(2, 1), torch.zeros(2).int(), np.zeros(2), "a", "b", 1]
    assert len({digest_of([content]) for content in contents}) == len(contents)


def test_what_cannot_be_fetched_has_none_and_is_told_later() -> None:
    rows = {1: torch.zeros(1), 2: torch.zeros(1)}
    digests = digests_of("test", [0, 1, 2], rows.__getitem__)
    assert [*digests] == ["1", "2"]
    del rows[2]
    other = first_other("test", digests, rows.__getitem__)
    assert other is not None
    assert other.startswith("test sample 2, which cannot be fetched (KeyError: 2")


def test_samples_that_are_others_each_time_are_told_as_that() -> None:
    def fetch(sample: int) -> Tensor:
        return torch.rand(3)

    with pytest.raises(DataError, match="different numbers each time a test sample is fetched"):
        digests_of("test", [0], fetch)
    with pytest.raises(DataError, match="different numbers each time a test sample is fetched"):
        first_other("test", {"0": "00"}, fetch)
