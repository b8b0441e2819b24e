"""How to train: a recipe, and the optimizer and learning-rate schedule that it means."""

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from influence_jobs import terms
from influence_jobs.errors import ModelError
from influence_jobs.tasks.base import Task, call_own


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        optimizer: "task": the task's own; then lr, momentum, nesterov, weight_decay and
            no_bias_decay have no meaning.
        momentum: Of SGD, as `nesterov`.
        no_bias_decay: Whether weight decay spares parameters of one axis: biases, and the weights
            of normalisation layers.
        schedule: How the learning rate changes; see `rate_factor`. "task": the task's own.
        warmup: Number of first steps with a rising rate.
        step_every: Epochs between the steps of the schedule "step".
        step_factor: What each of them multiplies the rate with.
        clip_norm: The largest norm of a batch gradient of all parameters; None for no limit.
    """

    epochs: int
    batch_size: int
    optimizer: terms.Optimizer
    lr: float | None
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    no_bias_decay: bool = False
    schedule: terms.Schedule = "constant"
    warmup: int = 0
    step_every: int | None = None
    step_factor: float = 0.1
    clip_norm: float | None = None

    @property
    def by_task(self) -> bool:
        """Whether the task gives the optimizer or the schedule."""
        return "task" in (self.optimizer, self.schedule)

    def decays(self, parameter: Tensor) -> bool:
        """Whether weight decay acts on a parameter."""
        return parameter.ndim > 1 or not self.no_bias_decay


def rate_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """What the learning rate is multiplied with in a step, counted from 0 over the training.

    In the warmup of W steps it is (step + 1) / W. After it, with t of T steps done, it is 1
    (constant), (1 + cos(pi t / T)) / 2 (cosine; Loshchilov and Hutter 2017, without restarts), or
    1 - t / T (linear). "step" multiplies by `step_factor` after every `step_every` epochs, the
    warmup included.
    """
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    if recipe.schedule == "step":
        assert recipe.step_every is not None
        return float(recipe.step_factor ** (step // (recipe.step_every * steps_per_epoch)))
    done = (step - recipe.warmup) / max(1, recipe.epochs * steps_per_epoch - recipe.warmup)
    if recipe.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1 - done if recipe.schedule == "linear" else 1.0


@cache
def summed_rates(recipe: Recipe, epochs: range, steps_per_epoch: int) -> float:
    """The sum of the learning rates over all steps of some epochs, counted from 0."""
    assert recipe.lr is not None
    steps = range(epochs.start * steps_per_epoch, epochs.stop * steps_per_epoch)
    return recipe.lr * math.fsum(rate_factor(recipe, step, steps_per_epoch) for step in steps)


def make_optimizer(recipe: Recipe, groups: Iterable[Mapping[str, Any]]) -> Optimizer:
    """The recipe's optimizer, as torch has it, for groups of parameters."""
    assert recipe.lr is not None
    common: Any = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "fused": True}
    parameters: Any = list(groups)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **common)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, **common)
    return torch.optim.SGD(parameters, momentum=recipe.momentum, nesterov=recipe.nesterov, **common)


def decay_groups(recipe: Recipe, parameters: Iterable[tuple[Tensor, Tensor]]) -> list[Any]:
    """Groups for an optimizer: one, or a second one of what does not decay.

    Args:
        parameters: What is optimized, each with the parameter of the model that it stands for.
    """
    groups: dict[bool, list[Tensor]] = {}
    for optimized, parameter in parameters:
        groups.setdefault(recipe.decays(parameter), []).append(optimized)
    return [
        {"params": tensors} if decays else {"params": tensors, "weight_decay": 0.0}
        for decays, tensors in groups.items()
    ]


def optimizer_of(task: Task, recipe: Recipe, model: nn.Module) -> Optimizer:
    """The optimizer of one model: the recipe's, or the task's own.

    Raises:
        SpecError: The task's method takes other arguments.
        ModelError: What it gives is no optimizer of the model's parameters, or needs a closure.
    """
    if recipe.optimizer != "task":
        return make_optimizer(recipe, decay_groups(recipe, ((p, p) for p in model.parameters())))
    found = call_own(task, "optimizer", model)
    name = type(task).__name__
    if not isinstance(found, Optimizer):
        raise ModelError(
            f"optimizer() of {name} gives {type(found).__name__}: return a torch.optim.Optimizer"
        )
    own = set(model.parameters())
    if not all(p in own for group in found.param_groups for p in group["params"]):
        raise ModelError(
            f"optimizer() of {name} has other parameters than the model that it is given: build it "
            "from that model"
        )
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ModelError(
            f"optimizer() of {name} gives {type(found).__name__}, whose step() needs a closure: "
            "choose another, or define train()"
        )
    return found


def scheduler_of(
    task: Task, recipe: Recipe, optimizer: Optimizer, steps_per_epoch: int
) -> LRScheduler | None:
    """The schedule of one training, to be stepped after every step; None for a constant rate.

    Raises:
        SpecError: The task's method takes other arguments.
        ModelError: What it gives is no schedule of this optimizer.
    """
    if recipe.schedule == "task":
        found = call_own(
            task, "scheduler", optimizer, epochs=recipe.epochs, steps_per_epoch=steps_per_epoch
        )
        if not isinstance(found, LRScheduler) or isinstance(found, ReduceLROnPlateau):
            raise ModelError(
                f"scheduler() of {type(task).__name__} gives {type(found).__name__}: return a "
                "torch.optim.lr_scheduler.LRScheduler whose step() needs no argument"
            )
        if found.optimizer is not optimizer:
            raise ModelError(
                f"scheduler() of {type(task).__name__} belongs to another optimizer than the one "
                "that it is given: build it from that one"
            )
        return found
    if recipe.schedule == "constant" and not recipe.warmup:
        return None
    return LambdaLR(optimizer, lambda step: rate_factor(recipe, step, steps_per_epoch))
