"""Regions of image-to-image tasks that define outputs, targets and losses, and nothing more."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs.curvature import ConjugateGradient, GaussNewton
from influence_jobs.errors import SpecError
from influence_jobs.gradients import GradDots
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.jobs.queries import query_gradients, require_queries
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.tasks.base import Batch, Task

N, SIDE = 7, 6
POINT, AREA = (2, 5, 1, 1), (1, 2, 3, 2)


class TinyUNet(nn.Module):
    """Down, up by a transposed convolution, and a skip connection beside it."""

    def __init__(self, outputs: int):
        super().__init__()
        self.enter = nn.Conv2d(1, 3, 3, padding=1)
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.leave = nn.Conv2d(5, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped = torch.tanh(self.enter(x))
        deep = torch.tanh(self.down(skipped))
        found: Tensor = self.leave(torch.cat([skipped, torch.tanh(self.up(deep))], 1))
        return found


class ImageToImage(Task):
    """Outputs (B, C, H, W) and the loss of one sample."""

    batch_size = 3

    def __init__(self, targets: Tensor, loss: Callable[..., Tensor], output_loss: Any, outputs=1):
        self.loss_of_one, self.channels = loss, outputs
        x = torch.randn(N, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        self.data = TensorDataset(x.to(torch.float64), targets)
        self.output_loss = output_loss  # type: ignore[misc]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return TinyUNet(self.channels).double().eval()

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
        pairs = zip(self.outputs(model, batch), batch[1], strict=True)
        return torch.stack([self.loss_of_one(o, t) for o, t in pairs])


class LastChannels(ImageToImage):
    """Outputs (B, H, W, C)."""

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().outputs(model, batch).permute(0, 2, 3, 1)


class WithOutput(ImageToImage):
    quantities = ("loss", "output")


def values(*shape: int) -> Tensor:
    return torch.rand(N, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def classes() -> Tensor:
    found = torch.randint(3, (N, SIDE, SIDE), generator=torch.Generator().manual_seed(2))
    found[:, 1, 2] = -100
    return found


def cross_entropy(reduction: str, axis: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o.movedim(axis, 0)[None], t[None], reduction=reduction)

    return loss


SQUARES = {
    "mean": lambda o, t: (o - t).square().mean(),
    "sum": lambda o, t: (o - t).square().sum(),
    "half": lambda o, t: 0.5 * (o - t).square().mean(),
}


def tasks() -> dict[str, ImageToImage]:
    made = {
        name: ImageToImage(values(1, SIDE, SIDE), loss, "mse") for name, loss in SQUARES.items()
    }
    bce = F.binary_cross_entropy_with_logits
    made["binary"] = ImageToImage(values(2, SIDE, SIDE).round(), bce, "binary-cross-entropy", 2)
    for reduction in ("mean", "sum"):
        made[reduction + " of classes"] = ImageToImage(
            classes(), cross_entropy(reduction), "cross-entropy", 3
        )
    made["classes last"] = LastChannels(classes(), cross_entropy("mean", 2), "cross-entropy", 3)
    # As many classes as pixels on a side: shapes do not tell which axis has the classes.
    made["square"] = ImageToImage(classes(), cross_entropy("mean"), "cross-entropy", SIDE)
    made["square, last"] = LastChannels(classes(), cross_entropy("mean", 2), "cross-entropy", SIDE)

    def smooth(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.smooth_l1_loss(outputs, targets, reduction="none").flatten(1).mean(1)

    made["of one's own"] = ImageToImage(
        values(1, SIDE, SIDE), lambda o, t: smooth(o[None], t[None])[0], smooth
    )
    return made


TASKS = tasks()


def cut(task: ImageToImage, outputs: Tensor, targets: Tensor, region) -> tuple[Tensor, Tensor]:
    """One sample's outputs and targets in a region, pixel by pixel."""
    y, x, height, width = region
    pixels = [(i, j) for i in range(y, y + height) for j in range(x, x + width)]
    if isinstance(task, LastChannels):
        seen = torch.stack([outputs[i, j] for i, j in pixels]).unsqueeze(0)  # (1, n, C)
    else:
        seen = torch.stack([outputs[:, i, j] for i, j in pixels], dim=1).unsqueeze(1)  # (C, 1, n)
    return seen, torch.stack([targets[..., i, j] for i, j in pixels], dim=-1).unsqueeze(-2)


@pytest.mark.parametrize("region", [POINT, AREA], ids=["point", "area"])
@pytest.mark.parametrize("name", TASKS)
def test_the_loss_of_a_region_is_the_loss_of_its_pixels_alone(name: str, region) -> None:
    task = TASKS[name]
    model = task.model()
    ids = torch.arange(4)
    batch = task.test_batch(ids, None)
    found = task.measure(model, batch, "loss", region)
    expected = torch.stack(
        [
            task.loss_of_one(*cut(task, outputs, targets, region))
            for outputs, targets in zip(task.outputs(model, batch), batch[1], strict=True)
        ]
    )
    torch.testing.assert_close(found, expected.nan_to_num(nan=0))
    torch.testing.assert_close(
        task.measure(model, batch, "loss", (0, 0, SIDE, SIDE)), task.losses(model, batch)
    )
    assert task.test_size(0) == (SIDE, SIDE)


@pytest.mark.parametrize("region", [None, AREA], ids=["whole", "area"])
def test_the_output_of_a_region_is_its_squares_logits_or_those_of_the_classes(region) -> None:
    y, x, height, width = region or (0, 0, SIDE, SIDE)
    pixels = [(i, j) for i in range(y, y + height) for j in range(x, x + width)]
    for name, number in {
        "mean": lambda o, t, i, j: o[0, i, j] ** 2,
        "binary": lambda o, t, i, j: o[:, i, j].mean(),
        "mean of classes": lambda o, t, i, j: o[t[i, j], i, j],
        "classes last": lambda o, t, i, j: o[i, j, t[i, j]],
    }.items():
        task = TASKS[name]
        model = task.model()
        batch = task.test_batch(torch.arange(2), None)
        found = task.measure(model, batch, "output", region)
        for row, (o, t) in enumerate(zip(task.outputs(model, batch), batch[1], strict=True)):
            counted = [(i, j) for i, j in pixels if t.ndim == 3 or t[i, j] != -100]
            expected = torch.stack([number(o, t, i, j) for i, j in counted]).mean()
            torch.testing.assert_close(found[row], expected)


def test_influence_on_a_region_is_that_of_a_dense_solve() -> None:
    """s_test and scores of a point and an area, against matrices written out in float64."""
    task = TASKS["mean"]
    model = task.model()
    space, damping = ParameterSpace(model), 0.01
    queries = Queries(items=(Query(test=2, region=POINT), Query(test=4, region=AREA)))
    require_queries(task, queries)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    x, y = task.data.tensors

    def outputs(parameters: dict[str, Tensor], i: int) -> Tensor:
        return functional_call(model, parameters, (x[i : i + 1],))[0, 0]

    def flat(parts: dict[str, Tensor], leading: int) -> Tensor:
        return torch.cat([parts[name].flatten(leading) for name in space.shapes], dim=-1)

    jacobians = torch.stack(
        [flat(jacrev(outputs)(parameters, i), 2).flatten(0, 1) for i in range(N)]
    )
    gauss_newton = 2 * torch.einsum("nop,noq->pq", jacobians, jacobians) / (N * SIDE * SIDE)
    errors = torch.stack([(outputs(parameters, i) - y[i, 0]).flatten() for i in range(N)])
    gradients_NP = 2 * torch.einsum("no,nop->np", errors, jacobians) / (SIDE * SIDE)
    expected = []
    for query in queries.items:
        mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        top, left, height, width = query.region
        mask[top : top + height, left : left + width] = True
        inside = mask.flatten()
        rhs = 2 * errors[query.test][inside] @ jacobians[query.test][inside] / inside.sum()
        solved = torch.linalg.solve(gauss_newton + damping * torch.eye(space.size), rhs)
        expected.append(gradients_NP @ solved)

    rhs_QP = query_gradients(task, model, space, queries, 0, 2)
    operator = GaussNewton(model, space, task, torch.arange(N))
    vectors_QP = ConjugateGradient(damping, tolerance=1e-11).solve(operator, rhs_QP).x_QP
    with GradDots(copy.deepcopy(model), space, task.losses, vectors_QP, precision="float64") as d:
        found = d.total(task.batch(torch.arange(N), None)).t()
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-7, atol=1e-10)


def refusal(task: Task, quantity: str = "loss", region=AREA) -> str:
    items = (Query(test=0, region=region),)
    with pytest.raises(SpecError) as found:
        require_queries(task, Queries(items=items, quantity=quantity))
        task.measure(task.model(), task.test_batch(torch.tensor([0]), None), quantity, region)
    return str(found.value)


def test_what_has_no_regions_is_refused_with_the_cure() -> None:
    images = values(1, SIDE, SIDE)
    bare = ImageToImage(images, SQUARES["mean"], None)
    assert "has no image regions: leave --point and --region out" in refusal(bare)
    assert "or classes of pixels" in refusal(bare)

    class Rows(ImageToImage):
        def targets(self, batch: Batch) -> Tensor:
            return batch[1].flatten(1)

    assert "has no image regions" in refusal(Rows(images, SQUARES["mean"], "mse"))

    class OtherLoss(ImageToImage):
        def losses(self, model: nn.Module, batch: Batch) -> Tensor:
            return super().losses(model, batch) + 1

    assert "correct output_loss" in refusal(OtherLoss(images, SQUARES["mean"], "mse"))

    class OwnMeasure(ImageToImage):  # which need not know regions
        def measure(self, model, batch, quantity, region) -> Tensor:
            return self.losses(model, batch)

    assert OwnMeasure(images, SQUARES["mean"], "mse").test_size(0) is None

    def windows(outputs: Tensor, targets: Tensor) -> Tensor:
        return (
            F.conv2d(outputs - targets, torch.ones(1, 1, 3, 3).double()).square().flatten(1).sum(1)
        )

    own = ImageToImage(images, lambda o, t: windows(o[None], t[None])[0], windows)
    assert "1 x 1 pixels" in refusal(own, region=POINT)
    assert "choose a larger --region" in refusal(own, region=POINT)
    assert 'quantities = ("loss", "output")' in refusal(TASKS["mean"], "output")
    assert "define measure()" in refusal(
        type("Own", (WithOutput,), {})(images, own.loss_of_one, windows), "output", None
    )
    require_queries(
        WithOutput(images, SQUARES["mean"], "mse"),
        Queries(items=(Query(test=0, region=AREA),), quantity="output"),
    )
