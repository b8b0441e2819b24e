"""A module under two names, such as an embedding that encoder and decoder share."""

import torch
from torch import Tensor, nn

from influence_jobs.curvature.derivatives import function_of_parameters
from influence_jobs.gradients.forward_mode import directional_derivatives
from influence_jobs.gradients.functional import functional_call


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def losses(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x).square().sum(1)
    return out


def test_a_module_of_two_names_keeps_its_parameters() -> None:
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(5, 3)
    own = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    expected = losses(model, x)

    zeros = {name: torch.zeros_like(parameter) for name, parameter in own.items()}
    assert functional_call(model, zeros, (x,)).eq(0).all()
    function_of_parameters(model, losses, x)(zeros)
    directional_derivatives(model, losses, x, {n: torch.ones(2, *p.shape) for n, p in own.items()})

    assert {n: p is own[n] for n, p in model.named_parameters()} == dict.fromkeys(own, True)
    assert all(torch.equal(own[name], value) for name, value in before.items())
    assert torch.equal(losses(model, x), expected)
