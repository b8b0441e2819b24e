"""Exact influence through a training, compared with retrainings that weigh one sample otherwise."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_jobs.errors import ModelError
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.ffdnet import FFDNetGreyTask
from influence_jobs.training import batch_gradient, train
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.statistics import with_statistics
from influence_jobs.training.train import Trainer
from influence_jobs.training.trajectory import Trajectory
from influence_jobs.training.unrolled import Unrolled

from .ensembles import CPU, Points, SmallFFDNetTask, recipe

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
        x = x.to(next(model.parameters()))
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
            self.again, self.last = self.norm, nn.Linear(self.norm.num_features, 5)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.norm(self.first(x.flatten(1))))
            return self.last(torch.tanh(self.again(2 * hidden)))

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


def padded() -> nn.Module:
    """Sums over words, padding among them, of which torch gives the embedding no gradient."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 6, padding_idx=3)
            nn.init.normal_(self.words.weight)
            self.last = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            words = (2 * x.flatten(1)).long().clamp(-3, 3) + 3
            return self.last(torch.tanh(self.words(words).mean(1)))

    return Padded()


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
    "padding": (padded, recipe("sgd", 16, lr=0.2, momentum=0.5, weight_decay=0.05)),
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


def test_of_an_earlier_epoch_the_later_ones_do_not_count() -> None:
    network, how = CASES["schedule"]
    task = Weighted(network)
    found_QN = scores(task, how, epochs=2)
    np.testing.assert_allclose(found_QN[:, 17], differences(task, how, 17, 2), rtol=1e-5)


class Own(Weighted):
    """An optimizer with two groups, without one of the parameters, and a schedule of both rates."""

    kind: Any = torch.optim.SGD

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        first, _bias, *others = model.parameters()
        groups = [{"params": [first], "lr": 0.05}, {"params": others, "weight_decay": 0.1}]
        more = {"momentum": 0.7} if self.kind is torch.optim.SGD else {}
        return self.kind(groups, lr=0.1, **more)

    def scheduler(
        self, optimizer: torch.optim.Optimizer, *, epochs: int, steps_per_epoch: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=epochs * steps_per_epoch
        )


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_of_the_tasks_own_is_gone_back_through_if_torch_has_it(kind: Any) -> None:
    how = Recipe(3, 16, "task", lr=None, schedule="task", clip_norm=0.3)
    task = Own(smooth)
    task.kind = kind
    found_QN = scores(task, how)
    for sample in (3, 60):
        expected_Q = differences(task, how, sample, 3)
        np.testing.assert_allclose(found_QN[:, sample], expected_Q, rtol=1e-5, atol=1e-5)


class LateFeatures(Weighted):
    """Half of the features are zero in the first epoch, a quarter always."""

    def batch(self, ids: Tensor, draw: Draw) -> Any:
        x, *others = super().batch(ids, draw)
        x = x.clone()
        x[:, :, 3] = 0
        if draw.index == 0:
            x[:, :, 2] = 0
        return x, *others


def test_adam_goes_back_through_weights_without_a_gradient_so_far() -> None:
    task, how = LateFeatures(smooth), recipe("adam", 16, lr=0.02)
    found_QN = scores(task, how)
    assert np.isfinite(found_QN).all()
    for sample in (3, 60):
        np.testing.assert_allclose(
            found_QN[:, sample], differences(task, how, sample, 3), rtol=1e-5, atol=1e-6
        )


def test_an_interrupted_call_goes_on_to_the_same_bits() -> None:
    task, how = Weighted(normed), recipe("adam", 16, lr=0.02)
    steps = trajectory(task, how)
    asked = gradients(task, steps.train(ignored))
    kept, counts = [], []
    whole = Unrolled(steps, torch.float64).scores(
        asked, counts.append, keep=lambda state: kept.append(copy.deepcopy(state()))
    )
    assert counts == [*range(19)]
    for state in (kept[0], kept[6], kept[-1]):
        again = Unrolled(steps, torch.float64).scores(asked, ignored, state=state)
        assert torch.equal(again, whole)


def test_kept_states_are_used_and_no_more_than_the_root_of_the_steps() -> None:
    task, how = Weighted(smooth), recipe("sgd", 4, epochs=4, lr=0.1)  # 92 steps
    steps = trajectory(task, how)
    trained_once = steps.train(ignored).state_dict()
    kept: Any = steps._snapshots
    assert sorted(kept) == [*range(0, 92, 10), 92]
    assert steps.num_states == 11
    for step in (40, 50, 60, 70, 80, 90, 92):  # a killed worker got so far
        del kept[step]
    done: list[int] = []
    again = steps.train(done.append).state_dict()
    assert done == [*range(30, 93)]
    assert all(torch.equal(value, again[name]) for name, value in trained_once.items())
    assert len(kept) == 11
    assert [len(steps.segment(stop)) for stop in (92, 90, 85, 1)] == [2, 10, 5, 1]


def test_a_state_that_is_lost_while_going_back_is_computed_again() -> None:
    task, how = Weighted(smooth), recipe("sgd", 4, epochs=4, lr=0.1)
    steps = trajectory(task, how)
    steps.train(ignored)
    kept: Any = steps._snapshots
    whole = steps.segment(50)
    kept[40] = None  # damaged
    del kept[30]
    for one, other in zip(steps.segment(50), whole, strict=True):
        assert all(torch.equal(one.weights[name], w) for name, w in other.weights.items())
        assert torch.equal(one.ids, other.ids)
    assert kept[30] is not None and kept[40] is not None


def test_queries_in_pieces_or_one_by_one_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    task, how = Weighted(conv), CASES["conv"][1]
    together = scores(task, how)
    monkeypatch.setattr(batch_gradient, "MAX_BYTES", 1)
    np.testing.assert_allclose(scores(task, how), together, rtol=1e-9)
    monkeypatch.setattr(batch_gradient, "_look", lambda *_: False)
    np.testing.assert_allclose(scores(task, how), together, rtol=1e-9)


def test_float32_is_float64_up_to_rounding() -> None:
    class Single(Weighted):
        def model(self) -> nn.Module:
            return super().model().float()

        def batch(self, ids: Tensor, draw: Draw) -> Any:
            x, y, w = super().batch(ids, draw)
            return x.float(), y, w.float()

    task, how = Single(dropped), CASES["dropout"][1]
    steps = trajectory(task, how)
    exact = with_statistics(steps.train(ignored)).double()
    asked = gradients(task, exact)
    found, expected = (
        Unrolled(steps, t).scores(asked, ignored) for t in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


# -- what is refused ------------------------------------------------------------------------------


def refused(task: Any, how: Recipe, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        scores(task, how)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.RMSprop(p), "trained by RMSprop: train with one of these"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "amsgrad=True: leave it out"),
        (lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.5), "dampening=0.5: leave it out"),
        (lambda p: torch.optim.SGD(p, maximize=True), "maximize=True: leave it out"),
    ],
)
def test_another_optimizer_is_refused_by_name(make: Any, message: str) -> None:
    class Other(Weighted):
        def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
            return make(model.parameters())

    refused(Other(smooth), Recipe(1, 16, "task", lr=None), message)


SGD = recipe("sgd", 16, lr=0.1)


def test_half_precision_is_refused() -> None:
    class Half(Weighted):
        def model(self) -> nn.Module:
            return smooth().bfloat16()

    refused(Half(smooth), SGD, "is of bfloat16")


def test_statistics_that_are_means_of_all_batches_are_refused() -> None:
    refused(
        Weighted(lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16, momentum=None))),
        SGD,
        "momentum=None",
    )


class Counting(nn.Module):
    """Divides by a running maximum of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: Tensor
        self.register_buffer("largest", torch.ones(()))
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.largest.copy_(torch.maximum(self.largest, x.abs().max()))
        return self.linear(x.flatten(1) / self.largest)


def test_another_buffer_that_training_changes_is_refused() -> None:
    refused(Weighted(Counting), SGD, "buffer 'largest' of Counting changes in training")


class OwnTanh(torch.autograd.Function):
    """A backward that autograd takes for a constant in its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.tanh(x.detach()))
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return grad * (1 - y.square())


class OnceTanh(OwnTanh):
    """A backward that says that it cannot be differentiated, of which autograd tells nothing."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return OwnTanh.backward(ctx, grad)


class Applies(nn.Module):
    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


@pytest.mark.parametrize("function", [OwnTanh, OnceTanh])
def test_a_second_derivative_that_autograd_takes_for_zero_is_refused(function: Any) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), Applies(function), nn.Linear(8, 5))

    refused(Weighted(network), SGD, "differ from finite differences")


def test_a_second_derivative_that_torch_lacks_is_refused() -> None:
    class Margin(Weighted):
        def losses(self, model: nn.Module, batch: Any) -> Tensor:
            targets = torch.full((len(batch[0]), 5), -1)
            targets[:, 0] = batch[1]
            return F.multilabel_margin_loss(model(batch[0]), targets, reduction="none")

    refused(Margin(smooth), SGD, "torch cannot differentiate the gradient of Sequential")


@pytest.mark.parametrize("method", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_gradient_hook_is_refused_unless_its_weight_is_frozen(method: str) -> None:
    def network(*, frozen: bool = False) -> nn.Module:
        model = smooth()
        weight = next(model.parameters())
        getattr(weight, method)(lambda value: None)
        weight.requires_grad_(not frozen)
        return model

    refused(Weighted(network), SGD, rf"^parameter '.*weight' has a gradient hook \({method}\)")
    assert np.isfinite(scores(Weighted(partial(network, frozen=True)), SGD)).all()


class NoiseOfItsType(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)  # draws other numbers in float64


def test_random_numbers_that_depend_on_the_precision_are_refused() -> None:
    class Single(Weighted):
        def model(self) -> nn.Module:
            return super().model().float()

        def batch(self, ids: Tensor, draw: Draw) -> Any:
            x, y, w = super().batch(ids, draw)
            return x.float(), y, w.float()

    task = Single(lambda: nn.Sequential(NoiseOfItsType(), nn.Flatten(), nn.Linear(16, 5)))
    steps = trajectory(task, SGD)
    asked = gradients(task, with_statistics(steps.train(ignored)).double())
    assert Unrolled(steps, torch.float32).scores(asked, ignored).isfinite().all()
    with pytest.raises(ModelError, match=r"its random numbers.* use --precision float32"):
        Unrolled(steps, torch.float64).scores(asked, ignored)


def test_a_training_that_does_not_repeat_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Weighted(smooth)
    steps = trajectory(task, SGD)
    asked = gradients(task, steps.train(ignored))
    order = train.epoch_order
    monkeypatch.setattr(train, "epoch_order", lambda n, seed, epoch: order(n, seed + 1, epoch))
    with pytest.raises(ModelError, match="give other weights each time"):
        Unrolled(steps, torch.float64).scores(asked, ignored)


def test_a_deep_network_of_relus_is_taken() -> None:
    """It has so many kinks that differences need tiny steps."""

    class Larger(SmallFFDNetTask):
        def __init__(self) -> None:
            FFDNetGreyTask.__init__(self, patch_size=16, stride=16, limit=24)

    steps = trajectory(Larger(), recipe("adam", 8, lr=1e-3))
    assert next(Unrolled(steps, torch.float64).trial(1)) == 8
