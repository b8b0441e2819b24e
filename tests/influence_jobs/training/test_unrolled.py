"""Exact influence through a training, compared with retrainings that weigh one sample otherwise."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.statistics import with_statistics
from influence_jobs.training.train import Trainer
from influence_jobs.training.trajectory import Trajectory
from influence_jobs.training.unrolled import Unrolled

from .ensembles import CPU, Points, recipe

N, SEED, STEP = 90, 4, 1e-5


class Weighted(Points):
    """Points whose losses have weights, and three measures of a trained model: losses of points."""

    def __init__(self, network: Callable[[], nn.Module], **options: Any):
        super().__init__(network, **options)
        self.weights_N = torch.ones(N, dtype=torch.float64)

    def batch(self, ids: Tensor, draw: Draw) -> Any:
        return *super().batch(ids, draw), self.weights_N[ids]

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return super().losses(model, batch[:2]) * batch[2]

    def measures(self, model: nn.Module) -> Tensor:
        """Shape (3,)."""
        generator = torch.Generator().manual_seed(9)
        x = torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64)
        return F.cross_entropy(model(x), torch.tensor([0, 3, 1]), reduction="none")


class Kept(dict[int, Any]):
    """Snapshots in memory."""

    def steps(self) -> list[int]:
        return [*self]

    def read(self, step: int) -> Any:
        return copy.deepcopy(self.get(step))

    def write(self, step: int, state: Any) -> None:
        self[step] = copy.deepcopy(state)


def smooth() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 5)
    )


def dropped() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 5)
    )


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 5)
    )


def normed() -> nn.Module:
    # Without biases before the norms: their gradients are rounding errors, which Adam makes large.
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.Tanh(),
        nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2, affine=False, momentum=0.3), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip


def norm_called_twice() -> nn.Module:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(16, 6, bias=False), nn.BatchNorm1d(6)
            self.last = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.norm(self.first(x.flatten(1))))
            return self.last(torch.tanh(self.norm(2 * hidden)))

    return Twice()


def tied() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.second = nn.Linear(16, 16)
            self.second.weight = self.first.weight
            self.last = nn.Linear(16, 5)
            self.last.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.second(torch.tanh(self.first(x.flatten(1))))))

    return Tied()


def trained(task: Weighted, how: Recipe, epochs: int) -> nn.Module:
    trainer = Trainer(task, how, seed=SEED, device=CPU)
    while trainer.epoch < epochs:
        trainer.step()
    return trainer.model.eval()


def trajectory(task: Task, how: Recipe, *, epochs: int | None = None) -> Trajectory:
    return Trajectory(
        task, how, seed=SEED, epochs=epochs or how.epochs, device=CPU, snapshots=Kept()
    )


def gradients(task: Weighted, model: nn.Module) -> dict[str, Tensor]:
    """Of the measures by the trained model's weights and statistics."""
    exact = with_statistics(model)
    space = ParameterSpace(exact)
    return space.split(torch.stack([space.gradient(task.measures(exact)[i]) for i in range(3)]))


def ignored(done: int) -> None:
    """Progress."""


def scores(
    task: Weighted, how: Recipe, *, dtype: torch.dtype = torch.float64, **options: Any
) -> np.ndarray:
    steps = trajectory(task, how, **options)
    model = steps.train(ignored)
    return Unrolled(steps, dtype).scores(gradients(task, model), ignored).numpy()


def differences(task: Weighted, how: Recipe, sample: int, epochs: int) -> np.ndarray:
    """Minus N times the slope of the measures in one sample's weight."""
    found = []
    for step in (STEP, -STEP):
        task.weights_N[sample] = 1 + step
        found.append(task.measures(trained(task, how, epochs)).detach().numpy())
        task.weights_N[sample] = 1
    return -N * (found[0] - found[1]) / (2 * STEP)


CASES = {
    "sgd": (smooth, recipe("sgd", 16, lr=0.2)),
    "momentum": (smooth, recipe("sgd", 16, lr=0.1, momentum=0.8)),
    "nesterov": (smooth, recipe("sgd", 16, lr=0.1, momentum=0.8, nesterov=True)),
    "decay": (smooth, recipe("sgd", 16, lr=0.1, momentum=0.5, weight_decay=0.05)),
    "decay-no-bias": (
        smooth,
        recipe("sgd", 16, lr=0.1, momentum=0.8, weight_decay=0.1, no_bias_decay=True),
    ),
    "schedule": (
        smooth, recipe("sgd", 16, lr=0.2, momentum=0.8, schedule="cosine", warmup=4)
    ),
    "clipped": (smooth, recipe("sgd", 16, lr=0.3, momentum=0.5, clip_norm=0.4)),
    "adam": (smooth, recipe("adam", 16, lr=0.02)),
    "adam-decay": (smooth, recipe("adam", 16, lr=0.02, weight_decay=0.1, schedule="linear")),
    "adamw": (smooth, recipe("adamw", 16, lr=0.02, weight_decay=0.3, clip_norm=0.5)),
    "dropout": (dropped, recipe("sgd", 16, lr=0.2, momentum=0.5)),
    "dropout-adam": (dropped, recipe("adam", 16, lr=0.02)),
    "conv": (conv, recipe("sgd", 16, lr=0.2, momentum=0.8, schedule="step", step_every=1)),
    "batch-norm": (normed, recipe("sgd", 16, lr=0.1, momentum=0.5)),
    "batch-norm-adam": (normed, recipe("adam", 16, lr=0.02)),
    "norm-twice": (norm_called_twice, recipe("sgd", 16, lr=0.1, momentum=0.5)),
    "tied": (tied, recipe("adamw", 16, lr=0.01, weight_decay=0.1)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_scores_are_the_slopes_of_retrainings(case: str) -> None:
    """Every sample is in one batch an epoch, of three epochs."""
    network, how = CASES[case]
    task = Weighted(network, noise=0.1 if case == "momentum" else 0.0)
    found_QN = scores(task, how)
    for sample in (0, 17, 89):
        expected_Q = differences(task, how, sample, how.epochs)
        size = np.abs(found_QN).max()
        np.testing.assert_allclose(found_QN[:, sample], expected_Q, rtol=1e-5, atol=1e-6 * size)
