"""Recipes compared with loops written out by hand, with torch's own optimizers and schedules."""

import io
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules

from influence_jobs.errors import ModelError
from influence_jobs.jobs.saved_state import saved_bytes
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import EnsembleTrainer, Variant
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.recorded_norms import RecordedNorms
from influence_jobs.training.train import Trainer, epoch_order

from .ensembles import CPU, N, Points, convnet, mlp, recipe

STEPS = math.ceil(N / 8)  # of an epoch; recipes have three


def by_hand(
    task: Task,
    optimizer_of: Callable[[nn.Module], Optimizer],
    scheduler_of: Callable[[Optimizer], Any] = lambda _: None,
    clip: float | None = None,
) -> dict[str, torch.Tensor]:
    """Weights after three epochs of batches of 8 from seed 0."""
    torch.manual_seed(0)
    model = task.model().train()
    optimizer = optimizer_of(model)
    scheduler = scheduler_of(optimizer)
    for epoch in range(3):
        for ids in epoch_order(N, 0, epoch).split(8):
            optimizer.zero_grad()
            task.losses(model, task.batch(ids, Draw(0, epoch))).mean().backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return model.state_dict()


def finished(task: Task, how: Recipe) -> Trainer:
    trainer = Trainer(task, how, seed=0, device=CPU)
    while not trainer.finished:
        trainer.step()
    return trainer


def split(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Of the convolutional net: its two weights decay; two biases and BatchNorm's pair do not."""
    named = dict(model.named_parameters())
    weights = ["0.weight", "4.weight"]
    return [
        {"params": [named[name] for name in weights], "weight_decay": decay},
        {"params": [p for name, p in named.items() if name not in weights], "weight_decay": 0},
    ]


def warmed_up(optimizer: Optimizer, then: Any) -> Any:
    return schedules.SequentialLR(
        optimizer, [schedules.LinearLR(optimizer, 1 / 5, total_iters=4), then], [5]
    )


AFTER = 3 * STEPS - 5
BY_HAND: dict[str, tuple[Recipe, Any, Any, float | None]] = {
    "nesterov": (
        recipe("sgd", lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
        lambda m: SGD(m.parameters(), 0.05, 0.9, nesterov=True, weight_decay=1e-2),
        lambda _: None, None,
    ),
    "adamw": (
        recipe("adamw", lr=3e-3, weight_decay=0.1),
        lambda m: AdamW(m.parameters(), 3e-3, weight_decay=0.1),
        lambda _: None, None,
    ),
    "adamw, biases do not decay": (
        recipe("adamw", lr=3e-3, weight_decay=0.1, no_bias_decay=True),
        lambda m: AdamW(split(m, 0.1), 3e-3),
        lambda _: None, None,
    ),
    "clipped": (
        recipe("sgd", lr=0.1, clip_norm=0.5),
        lambda m: SGD(m.parameters(), 0.1),
        lambda _: None, 0.5,
    ),
    "cosine": (
        recipe("sgd", lr=0.1, schedule="cosine"),
        lambda m: SGD(m.parameters(), 0.1),
        lambda o: schedules.CosineAnnealingLR(o, 3 * STEPS), None,
    ),
    "warmup, cosine": (
        recipe("adam", lr=0.01, schedule="cosine", warmup=5),
        lambda m: Adam(m.parameters(), 0.01),
        lambda o: warmed_up(o, schedules.CosineAnnealingLR(o, AFTER)), None,
    ),
    "warmup, linear": (
        recipe("sgd", lr=0.1, momentum=0.9, schedule="linear", warmup=5),
        lambda m: SGD(m.parameters(), 0.1, 0.9),
        lambda o: warmed_up(o, schedules.LinearLR(o, 1, 0, total_iters=AFTER)), None,
    ),
    "warmup": (
        recipe("sgd", lr=0.1, warmup=5),
        lambda m: SGD(m.parameters(), 0.1),
        lambda o: schedules.LinearLR(o, 1 / 5, total_iters=4), None,
    ),
    "step": (
        recipe("sgd", lr=0.1, schedule="step", step_every=2, step_factor=0.2),
        lambda m: SGD(m.parameters(), 0.1),
        lambda o: schedules.StepLR(o, 2 * STEPS, 0.2), None,
    ),
}  # fmt: skip


def without_bias() -> nn.Module:
    """Before BatchNorm a bias has no gradient but rounding, which Adam makes steps of."""
    model = convnet()
    assert isinstance(model, nn.Sequential)
    model[0].bias = None
    return model


@pytest.mark.parametrize("name", BY_HAND)
def test_a_recipe_is_the_loop_that_people_write(name: str) -> None:
    how, optimizer_of, scheduler_of, clip = BY_HAND[name]
    task = Points(without_bias)
    expected = by_hand(task, optimizer_of, scheduler_of, clip)
    plain = by_hand(task, lambda m: SGD(m.parameters(), 0.1))
    found = finished(task, how).model.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=key)
    assert not torch.allclose(found["4.weight"], plain["4.weight"], rtol=1e-3)


class Scheduled(Points):
    """An optimizer and a schedule of its own; what a recipe says of them does not count."""

    def optimizer(self, model: nn.Module) -> Optimizer:
        head, rest = model[4].parameters(), model[:4].parameters()
        return torch.optim.RMSprop(
            [{"params": head, "lr": 1e-2}, {"params": rest}], lr=1e-3, eps=1e-3
        )

    def scheduler(self, optimizer: Optimizer, *, epochs: int, steps_per_epoch: int) -> Any:
        assert (epochs, steps_per_epoch) == (3, STEPS)
        return schedules.OneCycleLR(
            optimizer, [0.02, 0.01], epochs=epochs, steps_per_epoch=steps_per_epoch
        )


class Stepped(Points):
    def scheduler(self, optimizer: Optimizer, *, epochs: int, steps_per_epoch: int) -> Any:
        return schedules.MultiStepLR(optimizer, [4, steps_per_epoch], 0.3)


class WithNumPy(Points):
    """NumPy's numbers get into the state of both."""

    def scheduler(self, optimizer: Optimizer, *, epochs: int, steps_per_epoch: int) -> Any:
        return schedules.LambdaLR(optimizer, lambda step: np.cos(step / 100))


class Noisy(Optimizer):
    """Stochastic gradient Langevin dynamics: it draws in every step."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p -= 0.05 * p.grad - 0.01 * torch.randn_like(p)


class Drawing(Points):
    def optimizer(self, model: nn.Module) -> Optimizer:
        return Noisy(model.parameters())


OWN = Recipe(3, 8, "task", None, schedule="task")
OWN_SCHEDULE = recipe("sgd", lr=0.1, momentum=0.9, schedule="task")
OWN_OPTIMIZER = Recipe(3, 8, "task", None)


def test_a_tasks_own_optimizer_and_schedule_train() -> None:
    task = Scheduled(convnet)
    found = finished(task, OWN).model.state_dict()
    expected = by_hand(
        task, task.optimizer, lambda o: task.scheduler(o, epochs=3, steps_per_epoch=STEPS)
    )
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize(
    ("task", "how"),
    [
        (Points(convnet), BY_HAND["warmup, cosine"][0]),
        (Points(convnet), BY_HAND["adamw, biases do not decay"][0]),
        (Points(convnet), BY_HAND["step"][0]),
        (Scheduled(convnet), OWN),
        (Stepped(convnet), OWN_SCHEDULE),
        (WithNumPy(convnet), OWN_SCHEDULE),
        (Drawing(convnet), OWN_OPTIMIZER),
    ],
)
@pytest.mark.parametrize("stop_after", [1, STEPS, 3 * STEPS - 1])
def test_resumed_in_another_process_it_gives_the_same_bits(
    task: Task, how: Recipe, stop_after: int
) -> None:
    torch.manual_seed(1)
    whole = finished(task, how).model.state_dict()
    first = Trainer(task, how, seed=0, device=CPU)
    for _ in range(stop_after):
        first.step()
    file = io.BytesIO(saved_bytes(first.state_dict()))
    torch.manual_seed(2)
    second = Trainer(task, how, seed=0, device=CPU)
    second.load_state_dict(torch.load(file, weights_only=True))
    while not second.finished:
        second.step()
    for key, value in second.model.state_dict().items():
        assert torch.equal(value, whole[key]), key


def test_parameters_that_an_optimizer_leaves_out_gather_no_gradient() -> None:
    class Head(Points):
        def optimizer(self, model: nn.Module) -> Optimizer:
            return SGD(model[4].parameters(), 0.0)  # weights stay, and so do gradients

    task = Head(mlp)
    norms = RecordedNorms(task.model(), ["1"], N, reduction="layer", skip_epochs=0)
    trainer = Trainer(task, Recipe(1, N, "task", None), seed=0, device=CPU, norms=norms)
    trainer.step()
    once = norms.sums["1"].clone()
    trainer.epoch, trainer.step_in_epoch = 0, 0
    trainer.step()
    torch.testing.assert_close(norms.sums["1"], 2 * once)


def test_norms_are_recorded_before_the_gradient_is_clipped() -> None:
    task, found = Points(mlp), []
    for clip in (None, 1e-3):
        norms = RecordedNorms(task.model(), ["1"], N, reduction="layer", skip_epochs=0)
        how = recipe("sgd", lr=0.1, clip_norm=clip)
        Trainer(task, how, seed=0, device=CPU, norms=norms).step()
        found.append(norms.sums["1"])
    assert torch.equal(*found)
    assert found[0].any()


class Returning(Points):
    """What its hooks give is given to it."""

    def __init__(self, optimizer: Any = None, scheduler: Any = None):
        super().__init__(convnet)
        self._given = optimizer, scheduler

    def optimizer(self, model: nn.Module) -> Any:
        make = self._given[0]
        return make(model) if make else SGD(model.parameters(), 0.1)

    def scheduler(self, optimizer: Optimizer, *, epochs: int, steps_per_epoch: int) -> Any:
        return self._given[1](optimizer)


def _constant(optimizer: Optimizer) -> Any:
    return schedules.ConstantLR(optimizer)


class Unsaveable(SGD):
    def __init__(self, parameters: Any):
        super().__init__(parameters, 0.1)
        self.param_groups[0]["hook"] = CPU.__class__.__repr__


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "told"),
    [
        (lambda m: m, _constant, r"optimizer\(\) of Returning gives Sequential: return a torch"),
        (
            lambda m: SGD(convnet().parameters(), 0.1),
            _constant,
            "has other parameters than the model",
        ),
        (lambda m: torch.optim.LBFGS(m.parameters()), _constant, "gives LBFGS, whose step"),
        (None, lambda o: None, r"scheduler\(\) of Returning gives NoneType: return a torch"),
        (None, schedules.ReduceLROnPlateau, "gives ReduceLROnPlateau: .* needs no argument"),
        (
            None,
            lambda _: _constant(SGD(convnet().parameters(), 0.1)),
            "belongs to another optimizer",
        ),
        (lambda m: Unsaveable(m.parameters()), _constant, "has a state that cannot be saved"),
    ],
)
def test_hooks_that_give_something_else_are_refused(
    optimizer: Any, scheduler: Any, told: str
) -> None:
    with pytest.raises(ModelError, match=told):
        Trainer(Returning(optimizer, scheduler), OWN, seed=0, device=CPU)


@pytest.mark.parametrize("how", [OWN_SCHEDULE, OWN_OPTIMIZER])
def test_an_ensemble_never_replaces_them_silently(how: Recipe) -> None:
    variants = [Variant(0), Variant(1, Changes(removed=np.arange(4)))]
    with pytest.raises(ModelError, match=r"own optimizer or scheduler.* one at a time"):
        EnsembleTrainer(Scheduled(convnet), how, variants, device=CPU)


class Remembering(SGD):
    """Has nothing to save before its first step."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["seen"] = deque([1.0])


def test_a_state_that_cannot_be_resumed_is_refused_after_the_first_step() -> None:
    task = Returning(lambda m: Remembering(m.parameters(), 0.1), _constant)
    trainer = Trainer(task, OWN, seed=0, device=CPU)
    with pytest.raises(ModelError, match="has a state that cannot be saved"):
        trainer.step()
