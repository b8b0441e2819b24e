"""Ensembles of perceptrons compared with `Trainer` on each variant alone, in float64."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from influence_jobs.perceptrons import ensemble
from influence_jobs.perceptrons.ensemble import PerceptronSteps
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.mnist import MnistTask
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import EnsembleTrainer, Variant
from influence_jobs.training.ensemble_stacked import StackedSteps
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.train import Trainer

from ..training.ensembles import (  # noqa: TID252  (tests are no package to import from)
    ADAM,
    CLIPPED,
    CPU,
    MASKED,
    NESTEROV,
    ONE_ORDER,
    REMOVALS,
    SGD,
    STEPPED,
    VARIANTS,
    Points,
    SmoothedPoints,
    check_against_trainer,
    convnet,
    frozen,
    mlp,
    recipe,
    train,
)


@pytest.mark.parametrize(
    ("task", "how", "variants", "layers"),
    [
        (Points(mlp), SGD, VARIANTS, ("1", "4", "7")),
        (Points(mlp), recipe("sgd", lr=0.1), VARIANTS, ("1", "7")),
        (Points(mlp), recipe("sgd", 40, lr=0.1, momentum=0.5), VARIANTS, ("4",)),
        (Points(mlp), recipe("sgd", 200, lr=0.1), VARIANTS, ("1",)),
        (Points(mlp), SGD, ONE_ORDER, ("1", "7")),
        (Points(mlp), SGD, MASKED, ("1", "7")),
        (Points(lambda: mlp(0.2)), SGD, MASKED, ("1", "7")),
        (Points(lambda: mlp(0.2)), SGD, VARIANTS, ("1", "4", "7")),
        (Points(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 5))), SGD, VARIANTS, ("1",)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("reduction", ["kernel", "channel", "layer"])
def test_each_perceptron_is_what_it_is_alone(
    task: Task, how: Recipe, variants: Sequence[Variant], layers: tuple[str, ...], reduction: Any
) -> None:
    trainer = check_against_trainer(task, how, variants, layers, reduction)
    assert isinstance(trainer.steps, PerceptronSteps)


@pytest.mark.parametrize(
    ("task", "how"),
    [
        (Points(mlp), ADAM),
        (Points(mlp), NESTEROV),
        (Points(mlp), STEPPED),
        (Points(mlp), CLIPPED),
        (Points(mlp), recipe("sgd", lr=0.1, warmup=1)),
        (Points(mlp), recipe("sgd", lr=0.5, momentum=0.9, weight_decay=0.1)),  # complex rates
        (Points(mlp, noise=0.3), SGD),
        (Points(frozen), SGD),
        (SmoothedPoints(mlp), SGD),
        (Points(convnet), SGD),
    ],
)
def test_everything_else_takes_the_general_path(task: Task, how: Recipe) -> None:
    trainer = EnsembleTrainer(task, how, REMOVALS, device=CPU)
    assert isinstance(trainer.steps, StackedSteps)


@pytest.mark.parametrize("parted", [0, 1, 2, 3])
def test_rounding_that_parts_a_variant_does_not_decide(
    parted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a kink one variant may leave its twin; of three, all would by a wrong step alone."""
    asked, real = [], ensemble._agrees

    def agrees(steps: Any, task: Any, how: Any, variant: Variant, members: Any) -> bool:
        asked.append(variant)
        return real(steps, task, how, variant, members) and len(asked) > parted

    monkeypatch.setattr(ensemble, "_agrees", agrees)
    trainer = EnsembleTrainer(Points(mlp), SGD, VARIANTS, device=CPU)
    assert isinstance(trainer.steps, PerceptronSteps if parted < 3 else StackedSteps)
    assert len({id(variant) for variant in asked}) == len(asked) == min(parted + 1, 3)


def test_the_mnist_network_in_float32(mnist_dir: Path) -> None:
    task = MnistTask(data_dir=str(mnist_dir), limit=500)
    how = recipe("sgd", lr=0.003, momentum=0.9, weight_decay=0.001, epochs=2)
    changes = Changes(np.arange(100), np.arange(200, 300), np.zeros(100, np.int64))
    trainer = train(task, how, [Variant(0), Variant(1, changes)])
    assert isinstance(trainer.steps, PerceptronSteps)
    for i, (seed, change) in enumerate([(0, Changes()), (1, changes)]):
        alone = Trainer(task, how, seed=seed, device=CPU, changes=change)
        while not alone.finished:
            alone.step()
        state = trainer.model(i).state_dict()
        for name, expected in alone.model.state_dict().items():
            torch.testing.assert_close(state[name], expected, rtol=1e-4, atol=1e-6)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    train(Points(lambda: mlp(0.3)), SGD, VARIANTS)
    assert torch.equal(before, torch.get_rng_state())
