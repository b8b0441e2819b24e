"""Small models. Together they have every supported layer type and every kind of connection."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Case(NamedTuple):
    model: nn.Module
    layers: Sequence[str]
    losses: Callable[[nn.Module, Any], Tensor]
    batch: Any


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="none")


class ResNet(nn.Module):
    """Convolution, BatchNorm, in-place ReLU after both, residual add, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8, eps=1e-2)
        self.branch = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", bias=False)
        self.down = nn.Conv2d(8, 6, (3, 2), stride=2)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.stem(x)))
        h = h + self.act(self.branch(h))
        return self.head(self.act(self.down(h)).mean((2, 3)))


class Reader(nn.Module):
    """Embedding with padding, LayerNorm over one and two axes, Linear layers over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 6, padding_idx=2)
        self.norm = nn.LayerNorm(6)
        self.wide = nn.Linear(6, 10)
        self.act = nn.ReLU(inplace=True)
        self.narrow = nn.Linear(10, 5)
        self.norm_all = nn.LayerNorm((7, 5), eps=1e-3)
        self.head = nn.Linear(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.tokens(ids))
        h = self.narrow(self.act(self.wide(h)))
        return self.head(self.norm_all(h).mean(1))


def mlp() -> Case:
    model = nn.Sequential(
        nn.Linear(12, 9), nn.ReLU(inplace=True), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4)
    )
    return Case(model, ["0", "2", "4"], cross_entropy, (torch.randn(5, 12), labels()))


def resnet() -> Case:
    layers = ["stem", "norm", "branch", "down", "head"]
    return Case(ResNet(), layers, cross_entropy, (torch.randn(5, 3, 9, 8), labels()))


def depthwise() -> Case:
    model = nn.Sequential(
        nn.Conv2d(6, 12, 3, padding="same", groups=6),
        nn.ReLU(inplace=True),
        nn.Conv2d(12, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Case(model, ["0", "2"], cross_entropy, (torch.randn(5, 6, 5, 7), labels()))


def reader() -> Case:
    layers = ["tokens", "norm", "wide", "narrow", "norm_all", "head"]
    return Case(Reader(), layers, cross_entropy, (torch.randint(0, 9, (5, 7)), labels()))


def grid() -> Case:
    """Linear over two position axes, LayerNorm on vectors, a dict batch with shared entries."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 3))

    def losses(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return (model(batch["x"]) - batch["target"]).square().sum(1) * batch["scale"]

    batch = {"x": torch.randn(5, 2, 3, 4), "target": torch.randn(3), "scale": 0.5}
    return Case(model, ["0", "2", "3"], losses, batch)


def labels() -> Tensor:
    return torch.tensor([0, 3, 1, 1, 2])


@pytest.fixture(params=[mlp, resnet, depthwise, reader, grid], ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(7)
    made: Case = request.param()
    made.model.eval()
    return made


@pytest.fixture
def resnet_case() -> Case:
    torch.manual_seed(7)
    made = resnet()
    made.model.eval()
    return made


@pytest.fixture
def mlp_case() -> Case:
    torch.manual_seed(7)
    made = mlp()
    made.model.eval()
    return made
