from contextlib import nullcontext

import numpy as np
import pytest
import torch
from digits import DigitsTask
from torch import nn
from torch.utils.data import TensorDataset

from influence_jobs.errors import DataError, ModelError, SpecError
from influence_jobs.tasks.base import Batch, Draw, Task
from influence_jobs.training.ensemble import EnsembleTrainer, Variant
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.recorded_norms import RecordedNorms
from influence_jobs.training.train import Trainer, epoch_order

SGD = Recipe(epochs=2, batch_size=64, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=1e-3)
ADAM = Recipe(epochs=2, batch_size=64, optimizer="adam", lr=1e-3)


def trainer_of(task: Task, recipe: Recipe, *, seed: int = 0, reduction: str = "channel") -> Trainer:
    norms = RecordedNorms(
        task.model(),
        ["conv2", "head"],
        len(task.train_data()),
        reduction=reduction,  # type: ignore[arg-type]
        skip_epochs=1,
    )
    return Trainer(task, recipe, seed=seed, device=torch.device("cpu"), norms=norms)


def finish(trainer: Trainer) -> Trainer:
    while not trainer.finished:
        trainer.step()
    return trainer


def assert_same(one: Trainer, other: Trainer) -> None:
    for (name, a), b in zip(
        one.model.state_dict().items(), other.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert one.norms is not None
    assert other.norms is not None
    for layer, sums in one.norms.sums.items():
        assert torch.equal(sums, other.norms.sums[layer]), layer


@pytest.mark.parametrize("recipe", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("stop_after", [1, 23, 24, 30])
def test_training_resumed_from_its_state_gives_the_same_bits(
    digits_task: Task, recipe: Recipe, stop_after: int
) -> None:
    whole = finish(trainer_of(digits_task, recipe))
    first = trainer_of(digits_task, recipe)
    for _ in range(stop_after):
        first.step()
    state = first.state_dict()
    torch.manual_seed(1234)  # another process has another global state
    second = trainer_of(digits_task, recipe)
    second.load_state_dict(state)
    assert second.samples_seen == first.samples_seen
    assert_same(finish(second), whole)


class DigitsInFloat64(DigitsTask):
    """In float32 another memory layout rounds otherwise, and training makes rounding larger."""

    def model(self) -> nn.Module:
        return super().model().double()

    def train_data(self) -> TensorDataset:
        images, labels = super().train_data().tensors
        return TensorDataset(images.double(), labels)


def test_it_is_plain_training() -> None:
    """Compared with a loop written out by hand: same order, mean loss, torch's SGD."""
    task = DigitsInFloat64()
    trained = finish(trainer_of(task, SGD, seed=3))
    torch.manual_seed(3)
    model = task.model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for epoch in range(2):
        for ids in epoch_order(1500, 3, epoch).split(64):
            optimizer.zero_grad()
            task.losses(model, task.batch(ids, Draw(3, epoch))).mean().backward()
            optimizer.step()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(
            trained.model.state_dict()[name], expected, rtol=1e-9, atol=1e-12
        )


def test_every_epoch_has_each_sample_once_in_another_order() -> None:
    orders = [epoch_order(1000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("reduction", ["kernel", "channel", "layer"])
def test_recorded_norms_are_those_of_the_mean_batch_gradient(
    digits_task: Task, reduction: str
) -> None:
    """Algorithm 1: each epoch adds the norms of the batch's mean gradient to all its samples."""
    trainer = trainer_of(digits_task, SGD, reduction=reduction)
    for _ in range(trainer.steps_per_epoch):
        trainer.step()
    assert trainer.norms is not None
    assert all(not sums.any() for sums in trainer.norms.sums.values())  # the first epoch is skipped

    ids = epoch_order(1500, 0, 1)[:64]
    before = digits_task.model().train()
    before.load_state_dict(trainer.model.state_dict())
    digits_task.losses(before, digits_task.batch(ids, Draw(0, 1))).mean().backward()
    trainer.step()
    for layer, sums in trainer.norms.sums.items():
        weight = before.get_submodule(layer).weight
        assert isinstance(weight, torch.Tensor)
        assert weight.grad is not None
        expected = weight.grad.square().reshape(weight.shape[0], weight.shape[1], -1).sum(1).sqrt()
        if reduction == "kernel":
            expected = expected.reshape(sums.shape[1:])
        elif reduction == "channel":
            expected = expected.sum(1)
        else:
            expected = weight.grad.norm()
        for i in ids.tolist():
            torch.testing.assert_close(sums[i], expected, rtol=1e-5, atol=1e-7)
        others = np.setdiff1d(np.arange(1500), ids.numpy())
        assert not sums[others].any()


def test_seeds_differ_and_the_global_generator_is_left_alone(digits_task: Task) -> None:
    before = torch.get_rng_state()
    one, other = (
        Trainer(digits_task, SGD, seed=seed, device=torch.device("cpu")) for seed in (0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    weights = (trainer.model.get_parameter("conv1.weight") for trainer in (one, other))
    assert not torch.equal(*weights)


def test_the_reported_loss_is_the_mean_over_the_epoch(digits_task: Task) -> None:
    frozen = Recipe(epochs=1, batch_size=64, optimizer="sgd", lr=1e-30)
    trainer = Trainer(digits_task, frozen, seed=0, device=torch.device("cpu"))
    loss = None
    while not trainer.finished:
        loss = trainer.step()
    torch.manual_seed(0)
    model = digits_task.model().train()
    total = 0.0
    with torch.no_grad():
        for ids in epoch_order(1500, 0, 0).split(64):
            total += float(digits_task.losses(model, digits_task.batch(ids, Draw(0))).sum())
    assert loss == pytest.approx(total / 1500, rel=1e-6)


class DropoutTask(Task):
    """A task whose forward pass draws from torch's global generator."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 1))

    def train_data(self) -> TensorDataset:
        x = torch.linspace(-1, 1, 256).reshape(64, 4)
        return TensorDataset(x, x.sum(1, keepdim=True))

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        x, y = batch
        return (model(x) - y).square().mean(1)


@pytest.mark.parametrize("stop_after", [None, 5])
def test_the_seed_covers_what_is_random_in_training(stop_after: int | None) -> None:
    recipe = Recipe(epochs=2, batch_size=8, optimizer="sgd", lr=0.1)
    weights = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        trainer = Trainer(DropoutTask(), recipe, seed=0, device=torch.device("cpu"))
        while not trainer.finished:
            trainer.step()
            if global_seed == 2 and trainer.samples_seen == 8 * (stop_after or -1):
                state = trainer.state_dict()
                torch.manual_seed(3)
                trainer = Trainer(DropoutTask(), recipe, seed=0, device=torch.device("cpu"))
                trainer.load_state_dict(state)
        weights.append(trainer.model.state_dict()["0.weight"])
    assert torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_recorded_norms_of_any_dtype_are_those_of_its_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 3)).to(dtype)
    model[0].weight.grad = torch.randn(3, 50).to(dtype)
    norms = RecordedNorms(model, ["0"], 4, reduction="channel", skip_epochs=0)
    norms.add(model, torch.tensor([2, 0]), 0)
    expected = model[0].weight.grad.double().norm(dim=1)
    torch.testing.assert_close(norms.sums["0"][2].double(), expected, rtol=1e-6, atol=0)
    assert norms.sums["0"][1].eq(0).all()


class Normed(Task):
    """Points, and a network with BatchNorm."""

    def __init__(self, samples: int) -> None:
        self.x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0))

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

    def train_data(self) -> TensorDataset:
        return TensorDataset(self.x)

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        losses: torch.Tensor = model(batch[0]).square().sum(1)
        return losses


@pytest.mark.parametrize(
    ("samples", "batch_size", "told"),
    [
        (7, 3, "7 samples in batches of 3 leave a last batch of one, .* such as 4"),
        (7, 1, "7 samples in batches of 1 are batches of one, .* such as 4"),
        (1, 1, "cannot be trained on one sample"),
        (1, 8, "cannot be trained on one sample"),
        (7, 4, ""),
    ],
)
def test_a_batch_of_one_with_batch_norm(samples: int, batch_size: int, told: str) -> None:
    recipe = Recipe(epochs=1, batch_size=batch_size, optimizer="sgd", lr=0.1)
    with pytest.raises(SpecError, match=told) if told else nullcontext():
        finish(Trainer(Normed(samples), recipe, seed=0, device=torch.device("cpu")))


class Noised(Normed):
    """Its noise is of torch's global generator, which nothing here seeds."""

    def train_batch(self, ids: torch.Tensor, draw: Draw) -> Batch:
        return [self.x[ids] + 1e-3 * torch.randn(len(ids), 4)]


def test_samples_that_are_other_numbers_each_time_are_refused() -> None:
    recipe = Recipe(epochs=1, batch_size=4, optimizer="sgd", lr=0.1)
    with pytest.raises(DataError, match=r"train_batch\(\) of Noised gives different numbers"):
        Trainer(Noised(8), recipe, seed=0, device=torch.device("cpu"))
    with pytest.raises(DataError, match=r"train_batch\(\) of Noised gives different numbers"):
        EnsembleTrainer(Noised(8), recipe, [Variant(0)], device=torch.device("cpu"))


class Averaged(Normed):
    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return super().losses(model, batch).mean()


def test_a_mean_instead_of_one_loss_a_sample_is_refused() -> None:
    recipe = Recipe(epochs=1, batch_size=4, optimizer="sgd", lr=0.1)
    told = (
        r"losses\(\) has shape \(\), and one number for each sample is needed, shape \(4,\): leave"
    )
    with pytest.raises(ModelError, match=told):
        Trainer(Averaged(8), recipe, seed=0, device=torch.device("cpu")).step()
    variants = [Variant(0), Variant(1)]
    with pytest.raises(ModelError, match=r"shape \(2,\), .*, shape \(2, 4\): leave the mean"):
        EnsembleTrainer(Averaged(8), recipe, variants, device=torch.device("cpu")).step()
