"""Losses that are not finite: a sample's fault, or a training that diverged, and where."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from influence_jobs.errors import DataError, SpecError
from influence_jobs.perceptrons.ensemble import PerceptronSteps
from influence_jobs.tasks.base import Batch
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import EnsembleTrainer, Variant
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.train import CHECKED_EVERY, Trainer, epoch_order

from .ensembles import CPU, SGD, Points, convnet, mlp, recipe

BAD = 17


class Broken(Points):
    """One sample whose loss is not finite."""

    def __init__(self) -> None:
        super().__init__(convnet)
        self._x[BAD, 0, 0, 0] = torch.nan


class Rooted(Points):
    """One sample whose loss is finite, but the gradient of the root at 0 is not."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().losses(model, batch) + model[0](batch[0]).square().sum((1, 2, 3)).sqrt()

    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.Flatten(),
                                               nn.Linear(12, 5)))  # fmt: skip
        self._x[BAD] = 0


class Poisoned(Points):
    """Finite at first; from its step `bad` on the loss is not."""

    def __init__(self, bad: int):
        super().__init__(mlp)
        self.bad, self.calls = bad, 0

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        losses_B = super().losses(model, batch)
        if not model.training:
            return losses_B
        self.calls += 1
        return losses_B * torch.nan if self.calls > self.bad else losses_B


def train(task: Points, how: Recipe, **options: Any) -> Trainer:
    trainer = Trainer(task, how, seed=0, device=CPU, **options)
    while not trainer.finished:
        trainer.step()
        trainer.require_finite()
    return trainer


@pytest.mark.parametrize(
    ("task", "what"),
    [(Broken(), "training loss"), (Rooted(), "gradient of the training loss")],
)
def test_a_sample_at_fault_is_named(task: Points, what: str) -> None:
    told = rf"^the {what} of sample {BAD} is not finite before any training: check the sample$"
    with pytest.raises(DataError, match=told):
        train(task, SGD)


@pytest.mark.parametrize("task", [Broken(), Rooted()])
def test_left_out_it_does_no_harm_and_is_not_blamed(task: Points) -> None:
    changes = Changes(removed=np.array([BAD]))
    assert train(task, SGD, changes=changes).finished
    with pytest.raises(SpecError, match="diverged: the loss is not finite in epoch 1, step "):
        train(task, recipe("sgd", lr=1e300), changes=changes)


@pytest.mark.parametrize("bad", [0, 1, 11, 12, 13, 35])
def test_epoch_and_step_of_a_divergence(bad: int) -> None:
    epoch, step = bad // 12 + 1, bad % 12 + 1  # 90 samples in batches of 8
    told = f"diverged: the loss is not finite in epoch {epoch}, step {step}; lower the learning"
    with pytest.raises(SpecError, match=told):
        train(Poisoned(bad), SGD)


def test_a_long_epoch_is_not_waited_for() -> None:
    task = Poisoned(5)
    with pytest.raises(SpecError, match="in epoch 1, step 6;"):
        train(task, recipe("sgd", 1, lr=0.1))
    assert task.calls == CHECKED_EVERY < 90


def test_it_is_told_after_a_resume_too() -> None:
    first = Trainer(Poisoned(3), SGD, seed=0, device=CPU)
    for _ in range(6):
        first.step()
    second = Trainer(Poisoned(99), SGD, seed=0, device=CPU)
    second.load_state_dict(first.state_dict())
    while second.step_in_epoch:
        second.step()
    with pytest.raises(SpecError, match="in epoch 1, step 4;"):
        second.require_finite()


def test_a_state_of_an_earlier_version_was_finite() -> None:
    first = Trainer(Points(mlp), SGD, seed=0, device=CPU)
    for _ in range(14):
        first.step()
    state = first.state_dict()
    del state["finite_steps"]
    second = Trainer(Points(mlp), SGD, seed=0, device=CPU)
    second.load_state_dict(state)
    while second.step_in_epoch:
        second.step()
    second.require_finite()


@pytest.mark.parametrize("how", [SGD, recipe("adam", lr=1e-3)])  # blocks, and single steps
def test_an_ensemble_knows_which_variants_diverged_and_when(how: Recipe) -> None:
    class Infected(Points):
        """The first variant is without sample 60; the others' weights are NaN after it."""

        def __init__(self) -> None:
            super().__init__(mlp)
            self._x[60] = torch.nan

    without = [Changes(removed=np.array([i])) for i in (60, 61, 62)]
    variants = [Variant(seed, changes) for seed, changes in enumerate(without)]
    trainer = EnsembleTrainer(Infected(), how, variants, device=CPU)
    while not trainer.finished:
        trainer.step()
    assert isinstance(trainer.steps, PerceptronSteps) == (how is SGD)
    assert trainer.diverged(0) is None
    for variant in (1, 2):
        order = without[variant].order(epoch_order(90, variant, 0))
        place = int((order == 60).nonzero())
        found = trainer.diverged(variant)
        assert found is not None
        assert found[0] == 0
        assert found[1] // trainer.steps.longest == place // 8 // trainer.steps.longest
        assert found[1] <= place // 8
