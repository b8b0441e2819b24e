"""Models and samples in another number format: they stay the same function."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs.curvature import GaussNewton, Hessian
from influence_jobs.errors import DataError, ModelError
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.tasks.base import Batch, Draw, Task
from influence_jobs.tasks.placement import built_model, converted, in_dtype

CPU = torch.device("cpu")
ORIGIN, WEEK = 1.7e9, 6e5  # seconds: float32 rounds such times to two minutes


class Turns(nn.Module):
    """Turns pairs of inputs by angles that a complex buffer has, as rotary positions do."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3, dtype=dtype)
        turns = torch.polar(torch.ones(3), torch.tensor([0.3, 1.1, 2.0]))
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        pairs = torch.view_as_complex(rows.reshape(-1, 3, 2).float()) * self.turns
        return self.head(torch.view_as_real(pairs).flatten(1).to(self.head.weight.dtype))


class Times(nn.Module):
    """Counts times from a buffer of double precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3, dtype=dtype)
        self.register_buffer("origin", torch.tensor(ORIGIN + 0.5 * WEEK, dtype=torch.float64))

    def forward(self, times: Tensor) -> Tensor:
        return self.head(((times - self.origin) / WEEK).to(self.head.weight.dtype))


class Rows(Task):
    """Rows of one of these models."""

    output_loss = "cross-entropy"

    def __init__(self, kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> None:
        self.kind, self.dtype = kind, dtype

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.kind(self.dtype)  # type: ignore[call-arg]

    def train_data(self) -> TensorDataset:
        rows = torch.rand(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        rows = ORIGIN + WEEK * rows if self.kind is Times else rows.float()
        return TensorDataset(rows, torch.arange(20) % 3)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(batch[0])
        return found

    def targets(self, batch: Batch) -> Tensor:
        found: Tensor = batch[1]
        return found


def losses(task: Task, model: nn.Module, batch: Any) -> Tensor:
    return task.losses(model.eval(), batch).detach().double()


@pytest.mark.parametrize("kind", [Turns, Times])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_converted_model_is_the_same_function(kind: type[nn.Module], dtype: torch.dtype) -> None:
    task = Rows(kind)
    batch = task.batch(torch.arange(20), Draw(0))
    wanted = losses(task, task.model(), batch)
    model, fitting = converted(task, CPU, dtype)
    torch.testing.assert_close(losses(task, model, fitting(batch)), wanted, rtol=1e-6, atol=0)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
@pytest.mark.parametrize("model", [Turns, Times])
def test_products_are_of_the_samples_as_the_task_gives_them(
    kind: type[Any], model: type[nn.Module]
) -> None:
    """The model is linear in its weights, so its Gauss-Newton matrix is its Hessian."""
    task = Rows(model)
    built = converted(task, CPU)[0]
    space = ParameterSpace(built)
    v_QP = torch.randn(2, space.size, generator=torch.Generator().manual_seed(2))
    found_QP = kind(built, space, task, torch.arange(20), batch_size=7) @ v_QP

    batch = task.batch(torch.arange(20), Draw(0))
    hidden: list[Tensor] = []
    hook = built.get_submodule("head").register_forward_pre_hook(
        lambda _, args: hidden.append(args[0].detach().double())
    )
    with torch.no_grad():
        task.losses(built, batch)
    hook.remove()
    (x_NI,) = hidden

    def loss(theta_P: Tensor) -> Tensor:
        parts = {name: one[0] for name, one in space.split(theta_P[None]).items()}
        outputs = F.linear(x_NI, parts["head.weight"], parts["head.bias"])
        return F.cross_entropy(outputs, batch[1])

    theta_P = space.join({n: p[None].detach().double() for n, p in built.named_parameters()})[0]
    matrix_PP = torch.autograd.functional.hessian(loss, theta_P)
    torch.testing.assert_close(found_QP.double(), v_QP.double() @ matrix_PP, rtol=1e-4, atol=1e-6)


def test_a_model_of_double_precision_may_be_computed_in_float32() -> None:
    """It cannot take its samples as they are then."""
    task = Rows(Turns, torch.float64)
    model, fitting = converted(task, CPU, torch.float32)
    batch = task.batch(torch.arange(20), Draw(0))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    wanted = losses(task, task.model(), batch)
    torch.testing.assert_close(losses(task, model, fitting(batch)), wanted, rtol=1e-6, atol=0)


class Wide(Rows):
    """Its linear model takes the samples as they are, in its own type alone."""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(6, 3, dtype=self.dtype)

    def train_data(self) -> TensorDataset:
        rows = torch.rand(20, 6, generator=torch.Generator().manual_seed(1), dtype=self.dtype)
        return TensorDataset(rows, torch.arange(20) % 3)


def test_products_of_a_model_of_double_precision_may_be_in_float32() -> None:
    task = Wide(nn.Linear, torch.float64)
    v_QP = torch.randn(1, 21, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = []
    for dtype in (torch.float32, torch.float64):
        model = converted(task, CPU, dtype)[0]
        operator = GaussNewton(model, ParameterSpace(model), task, torch.arange(20))
        found.append((operator @ v_QP.to(dtype)).double())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_statistics_follow_the_weights_of_a_model() -> None:
    model = in_dtype(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), torch.float64)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64, torch.int64}


class Odd(Rows):
    """A model that is no plain one, made in `model` of the test."""

    def __init__(self, made: Any) -> None:
        self.made = made

    def model(self) -> nn.Module:
        found: nn.Module = self.made()
        return found


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), r"layer '0' \(LazyLinear\) has no weights"),
        (lambda: torch.jit.script(nn.Linear(6, 3)), "gives a scripted model"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
def test_models_that_cannot_be_looked_into_are_refused(made: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        built_model(Odd(made))
    with pytest.raises(ModelError, match=said):
        converted(Odd(made), CPU)


class Sparse(Rows):
    def batch(self, ids: Tensor, draw: Draw) -> Batch:
        rows, classes = super().batch(ids, draw)
        return rows.to_sparse(), classes


def test_sparse_tensors_in_a_batch_are_refused() -> None:
    with pytest.raises(DataError, match="a batch has a sparse_coo tensor in it"):
        Sparse(Turns).fingerprint()


def test_complex_buffers_follow_a_model_that_is_narrowed() -> None:
    model = nn.Linear(6, 3, dtype=torch.float64)
    model.register_buffer("turns", torch.ones(3, dtype=torch.complex128))
    assert in_dtype(model, torch.float32).turns.dtype == torch.complex64
    assert in_dtype(model, torch.float64).turns.dtype == torch.complex128
