"""What the dtype of a model costs: `python -m benchmarks.precision` prints the table of the docs.

The weights and data are rounded to the dtype; the reference is float64 with these weights. Errors
are ||found - reference|| / ||reference|| over all samples, the largest over layers and queries.
TF32 is not a GPU's: the factors of products and convolutions are rounded to it, on the CPU.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from influence_jobs.curvature import ConjugateGradient, EkFac, GaussNewton
from influence_jobs.gradients import GradDots, GradNorms
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.jobs.queries import query_gradients
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.tasks.base import Batch, Draw, Task

N, QUERIES, STEPS = 200, 4, 30


class Transformer(nn.Module):
    """Two layers over 12 tokens, and a class from their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.encoder(self.tokens(x)).mean(1))
        return found


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 16, 3, stride=2),
        nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


class Classes(Task):
    """Random samples whose classes a random network gave."""

    output_loss = "cross-entropy"

    def __init__(self, network: Callable[[], nn.Module], x: Tensor, layers: tuple[str, ...]):
        self.network, self.layers = network, layers
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.data = TensorDataset(x, (10 * network()(x)).argmax(1).detach())

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.network()

    def train_data(self) -> TensorDataset:
        return self.data

    def test_data(self) -> TensorDataset:
        return self.data

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(batch[0])
        return found

    def targets(self, batch: Batch) -> Tensor:
        found: Tensor = batch[1]
        return found

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), batch[1], reduction="none")


def tasks() -> dict[str, Classes]:
    draw = torch.Generator().manual_seed(0)
    return {
        "perceptron": Classes(perceptron, torch.randn(N, 20, generator=draw), ("0", "2", "4")),
        "convolutions": Classes(
            convolutions, torch.randn(N, 1, 10, 10, generator=draw), ("0", "3", "7")
        ),
        "transformer": Classes(
            Transformer,
            torch.randint(20, (N, 12), generator=draw),
            ("encoder.layers.0.linear1", "encoder.layers.1.linear2", "head"),
        ),
    }


def trained(task: Classes) -> nn.Module:
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batch = task.batch(torch.arange(N), Draw(0))
    for _ in range(STEPS):
        optimizer.zero_grad()
        task.losses(model, batch).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


class Rounded(Classes):
    """The task with its floating-point samples in another dtype."""

    def __init__(self, task: Classes, dtype: torch.dtype):
        x, y = task.data.tensors
        self.data = TensorDataset(x.to(dtype) if x.is_floating_point() else x, y)
        self.layers = task.layers


aten = torch.ops.aten


class AsTF32(TorchDispatchMode):
    """Rounds the factors of products and convolutions to 10 bits of mantissa, as GPUs do."""

    products = frozenset({
        aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
        aten.convolution.default, aten.convolution_backward.default,
    })  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.products:
            args, kwargs = pytree.tree_map_only(Tensor, self.rounded, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(values: Tensor) -> Tensor:
        if values.dtype != torch.float32:
            return values
        bits = values.contiguous().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def computed(task: Classes, model: nn.Module, damping: float, precision: Any) -> dict[str, Any]:
    """Norms, dots, and influence by CG and EK-FAC, as a job computes them."""
    batch = task.batch(torch.arange(N), Draw(0))
    space = ParameterSpace(model)
    queries = Queries(items=tuple(Query(test=i) for i in range(QUERIES)))
    gradients_QP = query_gradients(task, model, space, queries, 0, QUERIES)
    with GradNorms(model, task.layers, task.losses, reduction="channel", precision=precision) as of:
        norms = of(batch)

    def dots(vectors_QP: Tensor) -> Tensor:
        with GradDots(
            copy.deepcopy(model), space, task.losses, vectors_QP, precision=precision
        ) as of:
            return of.total(batch)

    found: dict[str, Any] = {"norms": norms, "dot products": dots(gradients_QP)}
    for name, solver in {"CG": ConjugateGradient(damping), "EK-FAC": EkFac(damping)}.items():
        operator = GaussNewton(model, space, task, torch.arange(N))
        found[name] = dots(solver.solve(operator, gradients_QP).x_QP)
    return found


def in_half(task: Classes, model: nn.Module) -> dict[str, Any]:
    """Norms and dot products of gradients as plain autograd gives them in the model's own dtype."""
    space = ParameterSpace(model)
    rows = []
    for i in range(N):
        loss = task.losses(model, task.batch(torch.tensor([i]), Draw(0))).sum()
        rows.append(space.gradient(loss))
    gradients_NP = torch.stack(rows)
    parts = space.split(gradients_NP)
    norms = {
        layer: parts[f"{layer}.weight"].double().flatten(2).norm(dim=2)
        if parts[f"{layer}.weight"].ndim == 3
        else parts[f"{layer}.weight"].double().norm(dim=2).flatten(2).sum(2)
        for layer in task.layers
    }
    dots = gradients_NP.double() @ gradients_NP[:QUERIES].double().t()
    return {"norms": norms, "dot products": dots, "CG": "refused", "EK-FAC": "refused"}


def by_mixed_sums(task: Classes, model: nn.Module, exact: nn.Module) -> dict[str, Any]:
    """Norms and dot products of the engines with weights of bfloat16, whose sums are in float32."""
    batch = task.batch(torch.arange(N), Draw(0))
    space = ParameterSpace(model)
    queries = Queries(items=tuple(Query(test=i) for i in range(QUERIES)))
    exact_task = Rounded(task, torch.float64)
    vectors_QP = query_gradients(exact_task, exact, space.of(exact), queries, 0, QUERIES)
    with GradNorms(
        model, task.layers, task.losses, reduction="channel", precision="bfloat16"
    ) as norms:
        found: dict[str, Any] = {"norms": norms(batch)}
    with GradDots(model, space, task.losses, vectors_QP, precision="bfloat16") as dots:
        found["dot products"] = dots.total(batch)
    return found | {"CG": "refused", "EK-FAC": "refused"}


def compared(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    cells = []
    for name, value in found.items():
        if isinstance(value, str):
            cells.append(value)
        elif isinstance(value, dict):
            cells.append(f"{max(error(value[k], wanted[name][k]) for k in value):.1g}")
        else:
            columns = range(value.shape[1])
            worst = max(error(value[:, q], wanted[name][:, q]) for q in columns)
            cells.append(f"{worst:.1g}")
    return cells


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| model | built in | computed in | norms | dot products | CG | EK-FAC |")
    print("|---|---|---|---|---|---|---|")
    for name, task in tasks().items():
        model = trained(task)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rounded = copy.deepcopy(model).to(dtype)
            exact_task = Rounded(Rounded(task, dtype), torch.float64)
            exact = copy.deepcopy(rounded).double()
            operator = GaussNewton(exact, ParameterSpace(exact), exact_task, torch.arange(N))
            damping = ConjugateGradient().damping_for(operator)
            wanted = computed(exact_task, exact, damping, "float64")
            ours = computed(
                Rounded(Rounded(task, dtype), torch.float32),
                copy.deepcopy(rounded).float(),
                damping,
                "float32",
            )
            built = str(dtype).removeprefix("torch.")
            print(f"| {name} | {built} | float32 | {' | '.join(compared(ours, wanted))} |")
            if dtype == torch.float32:
                with AsTF32():
                    tf32 = computed(Rounded(task, dtype), rounded, damping, "tf32")
                print(f"| {name} | {built} | tf32 | {' | '.join(compared(tf32, wanted))} |")
            if dtype != torch.float32:
                half = in_half(Rounded(task, dtype), rounded)
                print(f"| {name} | {built} | {built} | {' | '.join(compared(half, wanted))} |")
            if dtype == torch.bfloat16:
                mixed = by_mixed_sums(Rounded(task, dtype), rounded, exact)
                cells = " | ".join(compared(mixed, wanted))
                print(f"| {name} | {built} | bfloat16, sums in float32 | {cells} |")


if __name__ == "__main__":
    main()
