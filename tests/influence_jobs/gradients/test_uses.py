"""Uses of layers that a rule must not take for its own."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from influence_jobs.errors import ModelError
from influence_jobs.gradients import GradDots, GradNorms, ParameterSpace
from influence_jobs.gradients.reference import per_sample_gradients

ROWS = 5


class Layers(nn.Module):
    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self.layers, x)


def positions_first(layers: Any, x: Tensor) -> Tensor:
    return layers["a"](x.transpose(0, 1)).transpose(0, 1)


def flat(layers: Any, x: Tensor) -> Tensor:
    return layers["a"](x.flatten(0, 1)).view(*x.shape[:2], -1)


def learned_positions(layers: Any, x: Tensor) -> Tensor:
    return x + layers["a"](torch.arange(x.shape[1]))


def checkpointed(layers: Any, x: Tensor) -> Tensor:
    found: Tensor = checkpoint(lambda x: layers["a"](x).tanh(), x, use_reentrant=False)
    return found


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], nn.Module]]] = {
    "positions first, as many as samples": (positions_first, lambda: nn.Linear(3, 3)),
    "positions in the batch": (flat, lambda: nn.Linear(3, 3)),
    "an embedding of as many positions as samples": (learned_positions, lambda: nn.Embedding(9, 3)),
    "checkpointed": (checkpointed, lambda: nn.Linear(3, 3)),
}


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().sum((1, 2))


@pytest.mark.parametrize("case", CASES)
def test_norms_and_dot_products_of_unusual_uses(case: str) -> None:
    forward, layer = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(ROWS, ROWS, 3, requires_grad=case == "checkpointed")
    model = Layers(forward, a=layer()).eval()
    name = "layers.a.weight"
    double = copy.deepcopy(model).double()
    gradients = [
        torch.autograd.grad(losses(double, x[i : i + 1].double()), double.get_parameter(name))[0]
        for i in range(ROWS)
    ]
    expected = torch.stack(gradients).float()
    with GradNorms(model, ["layers.a"], losses, reduction="layer") as norms:
        torch.testing.assert_close(norms(x)["layers.a"].flatten(), expected.flatten(1).norm(dim=1))
    space = ParameterSpace(model, [name])
    v_QP = torch.randn(2, space.size)
    with GradDots(model, space, losses, v_QP) as dots:
        torch.testing.assert_close(dots.total(x), expected.flatten(1) @ v_QP.t())


def test_dot_products_look_at_the_weights_of_their_own_model() -> None:
    """A space may have been made of another copy; its layers go by their rules all the same."""
    model = nn.Sequential(nn.Linear(4, 3))
    space = ParameterSpace(model)
    other = copy.deepcopy(model).eval()
    x = torch.randn(6, 4)
    with GradDots(other, space, lambda m, x: m(x).sin().sum(1), torch.randn(2, 15)) as dots:
        dots(x)
        assert list(dots._layers) == ["0"]


def test_a_model_that_overwrites_its_batch_is_refused() -> None:
    model = Layers(lambda layers, x: layers["a"](x.sub_(0.3)), a=nn.Linear(3, 3)).eval()
    with (
        GradNorms(model, ["layers.a"], losses, reduction="layer") as norms,
        pytest.raises(ModelError, match="overwrite the batch"),
    ):
        norms(torch.randn(4, 2, 3))


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolutions_with_much_output_padding(kind: Any) -> None:
    torch.manual_seed(0)
    layer = kind(2, 4, 2, stride=1, dilation=3, output_padding=2, groups=2)
    model = nn.Sequential(layer).eval().double()
    x = torch.randn(3, 2, *(4,) * (layer.weight.ndim - 2), dtype=torch.float64)

    def sums(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).sin().flatten(1).sum(1)

    (expected,) = per_sample_gradients(model, ["0"], sums, x).values()
    with GradNorms(model, ["0"], sums, reduction="layer", precision="float64") as norms:
        torch.testing.assert_close(norms(x)["0"].flatten(), expected.flatten(1).norm(dim=1))
