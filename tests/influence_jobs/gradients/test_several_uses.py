"""Weights that several calls use: the norm of the sum, not the sum of the norms."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients import (
    GradDots,
    GradNorms,
    GradProjections,
    ParameterSpace,
    several_uses,
)
from influence_jobs.gradients.projections import projections
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.gradients.weights import weight_named


class Language(nn.Module):
    """An embedding that is also the last layer, a linear layer and a convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(23, 6, padding_idx=0)
        self.again = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 23)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.again(torch.tanh(self.again(self.table(ids)))).transpose(1, 2)
        return self.head(self.conv(torch.tanh(self.conv(h))).transpose(1, 2))


LAYERS = ["table", "again", "conv"]


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    scores = model(ids)[:, :-1].transpose(1, 2)
    return F.cross_entropy(scores, ids[:, 1:], reduction="none").sum(1)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Language().double().eval()


@pytest.fixture
def ids() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 23, (5, 7))


@pytest.mark.parametrize("reduction", ["layer", "channel", "kernel"])
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("block", [1, 2**24])
def test_norms_are_of_the_sum(
    model: nn.Module,
    ids: Tensor,
    reduction: Any,
    gram: bool,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(several_uses, "through_gram", lambda *_, **__: gram)
    monkeypatch.setattr(several_uses, "_BLOCK_CPU", block)
    weights = {name: weight_named(model, name) for name in LAYERS}
    gradients = gradients_one_by_one(
        model, [weight.parameter for weight in weights.values()], losses, ids
    )
    with GradNorms(model, LAYERS, losses, reduction=reduction, precision="float64") as engine:
        found = engine(ids)
        assert engine.slow_layers(ids) == {}
        engine.check(ids)
    for name, weight in weights.items():
        expected = weight.norms(gradients[weight.parameter], reduction)
        torch.testing.assert_close(found[name], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("power", [-90, 90])
def test_norms_out_of_range(model: nn.Module, ids: Tensor, power: int) -> None:
    """Squares that float32 cannot hold."""

    def scaled(model: nn.Module, ids: Tensor) -> Tensor:
        return losses(model, ids) * 2.0**power

    expected = {}
    with GradNorms(model, LAYERS, losses, reduction="layer", precision="float64") as engine:
        expected = {name: norms * 2.0**power for name, norms in engine(ids).items()}
    with GradNorms(model.float(), LAYERS, scaled, reduction="layer") as engine:
        found = engine(ids)
    for name, norms in expected.items():
        torch.testing.assert_close(found[name].double(), norms, rtol=1e-4, atol=0)


def test_dot_products_are_of_the_sum(model: nn.Module, ids: Tensor) -> None:
    space = ParameterSpace(model)
    v_QP = torch.randn(3, space.size, dtype=torch.float64)
    gradients = gradients_one_by_one(model, [*space.shapes], losses, ids)
    with GradDots(model, space, losses, v_QP, precision="float64") as engine:
        found, parts = engine.total(ids), engine(ids)
        assert set(engine._layers) == {"table", "again", "conv", "head"}
        engine.check(ids)
    expected = space.join(gradients) @ v_QP.t()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(sum(parts.values()), expected, rtol=1e-9, atol=1e-11)


def test_a_layer_that_is_called_more_often_later() -> None:
    """A second use that the first batch did not show is refused for norms."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def several(model: nn.Module, batch: tuple[Tensor, int]) -> Tensor:
        x, times = batch
        for _ in range(times):
            x = model(x)
        return x.square().sum(1)

    with GradNorms(net.eval(), ["0"], several, reduction="layer") as engine:
        engine((torch.randn(3, 6), 1))
        with pytest.raises(ModelError, match="called more than once"):
            engine((torch.randn(3, 6), 2))


class Sometimes(nn.Module):
    """Two layers share a weight; the second is called only where a batch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.never = nn.Linear(2, 2)

    def forward(self, batch: tuple[Tensor, bool]) -> Tensor:
        x, twice = batch
        h = torch.tanh(self.first(x))
        return self.second(h) if twice else h


def test_a_layer_that_shares_a_weight_and_is_called_later_only() -> None:
    """Its part is in projections and dot products too; a layer never called has zeros."""

    def squares(model: nn.Module, batch: tuple[Tensor, bool]) -> Tensor:
        return model(batch).square().sum(1)

    torch.manual_seed(0)
    model = Sometimes().double().eval()
    x, space = torch.randn(3, 4, dtype=torch.float64), ParameterSpace(model)
    gradients = gradients_one_by_one(model, [*space.shapes], squares, (x, True))
    maps = projections(
        model, space, outputs=2, inputs=2, distribution="gaussian", seed=0, whole=False
    )
    with GradProjections(model, space, squares, maps, precision="float64") as engine:
        engine((x, False))
        found = engine((x, True))
    for group, of_group in maps.items():
        parts = [
            one.to(torch.device("cpu"), torch.float64)(gradients[name])
            for name, one in of_group.items()
        ]
        wanted = torch.stack(parts).sum(0).flatten(1)
        torch.testing.assert_close(found[group], wanted, rtol=1e-9, atol=1e-11)
    v_QP = torch.randn(2, space.size, dtype=torch.float64)
    with GradDots(model, space, squares, v_QP, precision="float64") as dots:
        dots.total((x, False))
        torch.testing.assert_close(dots.total((x, True)), space.join(gradients) @ v_QP.t())
