"""Weights of bfloat16 with sums in float32, against float64 with the same weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_jobs.gradients import GradDots, GradNorms, GradProjections
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.projections import projections

B, T = 6, 400


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip


class Sequences(nn.Module):
    """Attention over tokens; its parameters have no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.tokens(x)).mean(1))
        return out


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "perceptron": (perceptron, lambda: torch.randn(B, 12)),
    "convolutions": (convolutions, lambda: torch.randn(B, 3, 8, 8)),
    "sequences": (Sequences, lambda: torch.randint(20, (B, 9))),
}


@pytest.fixture(params=sorted(CASES))
def half(request: Any) -> tuple[nn.Module, Any]:
    """A model of bfloat16, and its batch."""
    make, samples = CASES[request.param]
    torch.manual_seed(0)
    x = samples()
    x = x.bfloat16() if x.is_floating_point() else x
    return make().bfloat16().eval(), (x, torch.randint(5, (B,)))


def exact(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Each sample's gradients (B, *shape) in float64 by plain autograd."""
    model = copy.deepcopy(model).double()
    rows = []
    for i in range(B):
        x = batch[0][i : i + 1]
        x = x.double() if x.is_floating_point() else x
        loss = losses(model, (x, batch[1][i : i + 1])).sum()
        rows.append(torch.autograd.grad(loss, list(model.parameters())))
    names = [name for name, _ in model.named_parameters()]
    return {n: torch.stack(found) for n, found in zip(names, zip(*rows, strict=True), strict=True)}


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def test_norms_dots_and_projections(half: tuple[nn.Module, Any]) -> None:
    model, batch = half
    wanted = exact(model, batch)
    layers = [n.removesuffix(".weight") for n in wanted if n.endswith(".weight")]
    with GradNorms(model, layers, losses, reduction="layer", precision="bfloat16") as norms:
        norms.check(batch)
        found = norms(batch)
    for layer in layers:
        assert found[layer].dtype == torch.float32
        assert error(found[layer], wanted[f"{layer}.weight"].flatten(1).norm(dim=1)) < 0.05, layer
    space = ParameterSpace(model)
    gradients_BP = space.join(wanted)
    vectors_QP = gradients_BP[:2].float()
    with GradDots(model, space, losses, vectors_QP, precision="bfloat16") as dots:
        dots.check(batch)
        assert error(dots.total(batch), gradients_BP @ vectors_QP.double().t()) < 0.05
    maps = projections(
        model, space, outputs=4, inputs=4, distribution="gaussian", seed=0, whole=False
    )
    with GradProjections(model, space, losses, maps, precision="bfloat16") as projected:
        projected.check(batch)
        rows = projected(batch)
    for group, of_group in maps.items():
        expected = sum(
            (one.to(torch.device("cpu"), torch.float64)(wanted[n]) for n, one in of_group.items()),
            start=torch.zeros(()),
        )
        assert rows[group].dtype == torch.float32
        assert error(rows[group], expected.flatten(1)) < 0.06, group


def test_sums_over_positions_are_in_float32() -> None:
    """From the layer's own rounded inputs and output gradients, to seven digits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).bfloat16().eval()
    seen: dict[str, Tensor] = {}

    def of(model: nn.Module, x: Tensor) -> Tensor:
        y = model(x)
        if y.requires_grad:
            y.register_hook(lambda g: seen.__setitem__("g", g))
        return y.float().square().sum((1, 2))

    x = torch.randn(B, T, 8).bfloat16()
    with GradNorms(model, ["0"], of, reduction="layer", precision="bfloat16") as engine:
        found = engine(x)["0"]
    gradients = torch.einsum("btc,bti->bci", seen["g"].double(), x.double())
    assert error(found, gradients.flatten(1).norm(dim=1)) < 1e-6
    in_half = torch.einsum("btc,bti->bci", seen["g"], x).double().flatten(1).norm(dim=1)
    assert error(in_half, gradients.flatten(1).norm(dim=1)) > 1e-5
