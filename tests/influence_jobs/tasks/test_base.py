"""Copies of models."""

import copy

import pytest
import torch
from torch import nn

from influence_jobs.tasks.base import copy_of


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
