"""Norms of biases, which are asked for by their full names."""

import pytest
import torch
from torch import Tensor, nn

from influence_jobs.gradients import GradNorms
from influence_jobs.gradients.reference import gradients_one_by_one


class Shared(nn.Module):
    """Two layers with one bias, the first called twice, and one input, so that shapes agree."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.conv = nn.Linear(1, 4), nn.Conv1d(3, 3, 1)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(torch.tanh(self.enter(x))))
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("reduction", ["layer", "channel"])
def test_a_bias_has_its_own_norms_beside_those_of_its_layer(reduction) -> None:
    torch.manual_seed(0)
    model, x = Shared().double().eval(), torch.randn(5, 3, 1, dtype=torch.float64)

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum((1, 2))

    names = ["enter", "enter.bias", "conv.bias", "first.bias", "first"]
    full = [name if "." in name else f"{name}.weight" for name in names]
    expected = gradients_one_by_one(model, full, losses, x)
    with GradNorms(model, names, losses, reduction=reduction, precision="float64") as norms:
        found = norms(x)
        assert norms.slow_layers(x) == {}
        norms.check(x)
    for name, parameter in zip(names, full, strict=True):
        rows_BCI = expected[parameter].reshape(5, len(expected[parameter][0]), -1)
        by_row = rows_BCI.norm(dim=2)
        torch.testing.assert_close(
            found[name], by_row if reduction == "channel" else by_row.norm(dim=1)
        )
