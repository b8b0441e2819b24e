"""A small network with Linear, Conv2d and BatchNorm layers, and its dense float64 curvature."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from influence_jobs.curvature import GaussNewton, Hessian
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.tasks.base import Task
from influence_jobs.terms import OutputLoss

N = 24


class SmallNet(nn.Module):
    def __init__(self, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(12, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))


class Classes(Task):
    """Cross-entropy of three classes."""

    batch_size = 10
    output_loss: ClassVar[OutputLoss | None] = "cross-entropy"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(N, 1, 4, 4, generator=generator)
        self.y = torch.randint(3, (N,), generator=generator)

    def model(self) -> nn.Module:
        return SmallNet(3)

    def train_data(self) -> Tensor:
        return self.y

    def batch(self, ids, draw):
        return self.x[ids], self.y[ids]

    def outputs(self, model, batch):
        return model(batch[0])

    def targets(self, batch):
        return batch[1]

    def losses(self, model, batch):
        return F.cross_entropy(self.outputs(model, batch), batch[1], reduction="none")


class Values(Classes):
    """Mean squared error of two numbers."""

    output_loss = "mse"

    def __init__(self) -> None:
        super().__init__()
        self.y = torch.randn(N, 2, generator=torch.Generator().manual_seed(4))

    def model(self) -> nn.Module:
        return SmallNet(2)

    def losses(self, model, batch):
        return (self.outputs(model, batch) - batch[1]).square().mean(1)


@dataclass
class Case:
    """A task, its model in eval mode, and the dense matrices."""

    task: Task
    model: nn.Module

    @property
    def space(self) -> ParameterSpace:
        return ParameterSpace(self.model)

    def gauss_newton(self, **options) -> GaussNewton:
        ids = options.pop("ids", torch.arange(N))
        return GaussNewton(self.model, self.space, self.task, ids, **options)

    def hessian(self, **options) -> Hessian:
        return Hessian(self.model, self.space, self.task, torch.arange(N), **options)

    def _flat(self, function: Callable[[nn.Module], Tensor]) -> Callable[[Tensor], Tensor]:
        model = self.model

        class Applied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self) -> Tensor:
                return function(self.model)

        def of(flat_P: Tensor) -> Tensor:
            named = {f"model.{k}": v for k, v in self.space.split(flat_P).items()}
            return functional_call(Applied(), named, ())

        return of

    def dense_hessian(self, ids: Tensor | None = None) -> Tensor:
        batch = self._batch(ids)
        loss = self._flat(lambda model: self.task.losses(model, batch).mean())
        return hessian(loss)(self._theta)

    def dense_gauss_newton(self, ids: Tensor | None = None) -> Tensor:
        batch = self._batch(ids)
        outputs = self._flat(lambda model: self.task.outputs(model, batch))
        jacobian_BCP = jacrev(outputs)(self._theta)
        total = torch.zeros(self.space.size, self.space.size, dtype=jacobian_BCP.dtype)
        for out_C, target, jacobian_CP in zip(
            outputs(self._theta), batch[1], jacobian_BCP, strict=True
        ):
            if self.task.output_loss == "mse":
                inner_CC = hessian(lambda o, t=target: (o - t).square().mean())(out_C)
            else:
                inner_CC = hessian(lambda o, t=target: F.cross_entropy(o, t))(out_C)
            total += jacobian_CP.T @ inner_CC @ jacobian_CP
        return total / len(jacobian_BCP)

    def _batch(self, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        x, y = self.task.batch(torch.arange(N) if ids is None else ids, None)
        dtype = next(self.model.parameters()).dtype
        return x.to(dtype), y.to(dtype) if y.is_floating_point() else y

    @property
    def _theta(self) -> Tensor:
        return self.space.join(self.space.parameters()).detach()


@pytest.fixture(params=[Classes, Values], ids=["cross-entropy", "mse"])
def case(request) -> Case:
    torch.manual_seed(0)
    task = request.param()
    model = task.model()
    model(task.x * 2 + 1)  # running statistics that are not the initial ones
    return Case(task, model.eval().double())


def randoms(rows: int, size: int, dtype=torch.float64) -> Tensor:
    return torch.randn(rows, size, dtype=dtype, generator=torch.Generator().manual_seed(7))
