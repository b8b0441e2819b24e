"""Copies of models, and tasks that are dataclasses."""

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs.tasks.base import Task
from influence_jobs.tasks.layout import in_fast_layout
from influence_jobs.tasks.placement import copy_of


def test_a_model_that_keeps_a_result_of_autograd_is_copied() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 1))
    model(torch.randn(1, 3))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    copied = copy_of(model).double()
    x = torch.randn(4, 3)
    torch.testing.assert_close(copied(x.double()), model(x).double(), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        copied[0].weight_g *= 2
    assert not torch.allclose(copied(x.double()).float(), model(x))
    assert [name for name, _ in copied.named_parameters()] == [
        n for n, _ in model.named_parameters()
    ]


class Images(Task):
    width: int

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, self.width, 3), nn.Flatten(), nn.Linear(self.width, 3))

    def train_data(self) -> TensorDataset:
        return TensorDataset(torch.ones(4, 3, 3, 3), torch.arange(4) % 3)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@dataclass(frozen=True)
class Frozen(Images):
    """Its object cannot be written to."""

    width: int = 2


@dataclass
class Unhashable(Images):
    """Its object has no hash."""

    width: int = 2


@pytest.mark.parametrize("kind", [Frozen, Unhashable])
def test_a_task_may_be_a_dataclass(kind: Any) -> None:
    task = pickle.loads(pickle.dumps(kind(width=5)))
    assert task.given == {"width": 5}
    assert task.train_data() is task.train_data()
    model = in_fast_layout(task, task.model())
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
