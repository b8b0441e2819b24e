"""From the spec of a training to the recipe of a trainer, and to what its schedule says of it."""

import math
from dataclasses import dataclass, fields

from influence_jobs.kinds.train.spec import Checkpoint, TrainedCheckpoint, TrainSpec
from influence_jobs.specs.base import TaskSpec
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.registry import make_task, with_place_of
from influence_jobs.training.recipe import Recipe, summed_rates


def recipe_of(spec: TrainSpec) -> Recipe:
    """The fields of a training that a trainer needs; the names are the same."""
    return Recipe(**{field.name: getattr(spec, field.name) for field in fields(Recipe)})


def flow_time(train: TrainSpec, num_samples: int, epochs: range) -> float:
    """The time that gradient flow takes for some epochs of SGD, counted from 0.

    It is the sum of the steps' learning rates, divided by 1 - momentum (Bae et al.: "Training Data
    Attribution via Approximate Unrolled Differentiation", 2024).
    """
    assert train.follows_gradient
    steps = math.ceil(num_samples / train.batch_size)
    return summed_rates(recipe_of(train), epochs, steps) / (1 - train.momentum)


@dataclass(frozen=True)
class ScheduledDamping:
    """Lambda as a training's schedule gives it, and how.

    Attributes:
        value: Of three digits, so that what is shown is what is used.
    """

    value: float
    how: str


def scheduled_damping(checkpoint: Checkpoint, num_samples: int) -> ScheduledDamping | None:
    """The lambda that stands for the end of training; None if the checkpoint does not say it.

    In the time t of gradient flow an eigenvalue s of the curvature, weight decay w included, takes
    a perturbation's gradient times (1 - exp(-t s)) / s: the formula of SOURCE (Bae et al. 2024)
    with one segment. 1 / (s + 1 / t) has the same limits, t for small and 1 / s for large s, and is
    nowhere more than 30 % off. So lambda = w + 1 / t = w + (1 - momentum) / sum of learning rates.
    """
    if not isinstance(checkpoint, TrainedCheckpoint) or not checkpoint.train.follows_gradient:
        return None
    train = checkpoint.train
    time = flow_time(train, num_samples, range(checkpoint.epoch))
    steps = checkpoint.epoch * math.ceil(num_samples / train.batch_size)
    value = float(f"{train.weight_decay + 1 / time:.3g}")
    rate = f"learning rate {train.lr:g}"
    if train.schedule != "constant" or train.warmup:
        rate = f"mean learning rate {time * (1 - train.momentum) / steps:.3g}"
    how = f"(1 - momentum {train.momentum:g}) / ({rate} x {steps:,} steps)"
    if train.weight_decay:
        how += f" + weight decay {train.weight_decay:g}"
    return ScheduledDamping(value, how)


def trained_task(recipe: TrainSpec, scored: TaskSpec, task: Task) -> Task:
    """The task with the options that it is trained with; others change how scores see samples.

    Args:
        scored: What `task` was made of, whose data are here.
    """
    if recipe.task.options == scored.options:
        return task
    return make_task(with_place_of(recipe.task, scored))
