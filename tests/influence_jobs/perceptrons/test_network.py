"""Which models are recognised as perceptrons."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_jobs.models.mnist_mlp import MnistMLP
from influence_jobs.perceptrons.network import Perceptron, find_perceptron

A, B = (4, 3), (3, 2)


class Functional(nn.Module):
    def __init__(
        self, last: Callable[[Tensor], Tensor], middle: Callable[[Tensor], Tensor] = F.relu
    ):
        super().__init__()
        self.one, self.two = nn.Linear(*A), nn.Linear(*B)
        self.last, self.middle = last, middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.middle(self.one(x.flatten(1)))))


class Skipping(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)) + x[:, :3])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x)))


class Masked(nn.Linear):
    """A subclass may compute anything."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("model", "perceptron"),
    [
        (MnistMLP(), Perceptron(("fc1", "fc2", "fc3"), (0.0, 0.0))),
        (nn.Sequential(nn.Linear(*A)), Perceptron(("0",), ())),
        (nn.Sequential(nn.Flatten(), nn.Linear(*A), nn.ReLU(inplace=True), nn.Dropout(0.25),
                       nn.Linear(*B)),
         Perceptron(("1", "4"), (0.25,))),
        (nn.Sequential(nn.Sequential(nn.Linear(*A), nn.ReLU()), nn.Linear(*B), nn.LogSoftmax(1)),
         Perceptron(("0.0", "1"), (0.0,))),
        (Functional(lambda z: F.log_softmax(z, dim=-1)), Perceptron(("one", "two"), (0.0,))),
        (Functional(lambda z: z.log_softmax(1), torch.relu), Perceptron(("one", "two"), (0.0,))),
    ],
)  # fmt: skip
def test_perceptrons_are_found(model: nn.Module, perceptron: Perceptron) -> None:
    assert find_perceptron(model) == perceptron


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(*A), nn.Linear(*B)),
        nn.Sequential(nn.Linear(*A), nn.ReLU6(), nn.Linear(*B)),
        nn.Sequential(nn.Linear(*A), nn.ReLU()),
        nn.Sequential(nn.Linear(*A), nn.Dropout(0.1), nn.ReLU(), nn.Linear(*B)),
        nn.Sequential(nn.Dropout(0.1), nn.Linear(*A)),
        nn.Sequential(nn.Linear(*A), nn.ReLU(), nn.Flatten(), nn.Linear(*B)),
        nn.Sequential(nn.Linear(*A, bias=False), nn.ReLU(), nn.Linear(*B)),
        nn.Sequential(nn.Linear(*A), nn.LogSoftmax(0)),
        nn.Sequential(nn.Linear(*A), nn.LogSoftmax(1), nn.Linear(*B)),
        nn.Sequential(nn.Linear(*A), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(*B)),
        nn.Sequential(Masked(*A), nn.ReLU(), nn.Linear(*B)),
        nn.Sequential(nn.ReLU()),
        nn.Sequential(),
        Functional(lambda z: z / 2),
        Functional(lambda z: F.log_softmax(z, dim=0)),
        Functional(lambda z: z, F.gelu),
        Functional(lambda z: z, lambda z: F.relu(z) if z.sum() > 0 else z),
        Skipping(lambda z: z),
        Tied(),
    ],
)
def test_anything_else_is_none(model: nn.Module) -> None:
    assert find_perceptron(model) is None


def test_a_frozen_or_unused_parameter_makes_it_none() -> None:
    model = MnistMLP()
    model.fc2.bias.requires_grad_(False)
    assert find_perceptron(model) is None
    model = MnistMLP()
    model.spare = nn.Parameter(torch.zeros(1))
    assert find_perceptron(model) is None


class Remembering(nn.Module):
    """Keeps what it saw in its last forward pass, and a running mean."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen, self.mean = x, 0.9 * self.mean + 0.1 * x.mean(0)
        out: Tensor = self.layer(x)
        return out


def test_a_model_is_looked_at_without_a_change_to_it() -> None:
    model = Remembering()
    assert find_perceptron(model) is None
    assert model.seen is None
    assert torch.equal(model.mean, torch.zeros(4))
