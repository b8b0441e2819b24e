"""Choose how many variants to train side by side, by memory and by measured speed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.placement import to_device
from influence_jobs.training.ensemble import EnsembleTrainer, Variant
from influence_jobs.training.ensemble_norms import EnsembleNorms, NormsWanted
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.train import Trainer, initial_model

WIDTHS = (1, 2, 4, 8, 16, 32)
CLEARLY = 1.1  # times as fast; a smaller difference is within the noise of the measurement


def bytes_per_variant(
    task: Task, recipe: Recipe, *, device: torch.device, norms: NormsWanted | None = None
) -> int:
    """The largest amount of memory that one more variant takes.

    It includes weights, gradients, optimiser state, activations, norms and new labels. One forward
    pass is run to count the activations that autograd keeps.
    """
    n = len(task.train_data())
    model = initial_model(task, 0, device)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(min(recipe.batch_size, n))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.losses(model, to_device(task.train_batch(ids, Draw(0)), device)).mean()
    weights = sum(p.nbytes for p in model.parameters())
    copies = 3 if recipe.optimizer == "sgd" else 4  # weights, gradients, one moment or two (Adam)
    recorded = 0
    if norms is not None:
        sums = EnsembleNorms(
            norms, model, num_variants=1, num_samples=n, device=torch.device("meta")
        )
        recorded = sum(t.nbytes for t in sums.sums.values())
    buffers = sum(b.nbytes for b in model.buffers())
    new_labels = n * torch.int64.itemsize
    return copies * weights + buffers + sum(kept.values()) + recorded + new_labels


def measure_widths(
    task: Task,
    recipe: Recipe,
    *,
    device: torch.device,
    widths: Sequence[int] = WIDTHS,
    seconds: float = 1.0,
    memory: int | None = None,
) -> dict[int, float]:
    """Measure the speed of ensembles of several widths.

    Args:
        task: The task to train.
        recipe: How to train it.
        device: Device of the models.
        widths: Numbers of models to try.
        seconds: Time to train each, after a first stretch of steps that is not counted.
        memory: Available bytes. Widths that need more are left out, except the smallest.

    Returns:
        {width: steps per second of all models together}.
    """
    fits = len(widths) * [True]
    if memory is not None:
        each = bytes_per_variant(task, recipe, device=device)
        fits = [width * each <= memory or width == min(widths) for width in widths]
    rates = {}
    for width in (width for width, fit in zip(widths, fits, strict=True) if fit):
        trainer = EnsembleTrainer(
            task,
            replace(recipe, epochs=10**9),
            [Variant(seed) for seed in range(width)],
            device=device,
        )
        rates[width] = _rate(trainer, seconds, recipe.batch_size)
    return rates


def faster_alone(task: Task, recipe: Recipe, *, device: torch.device, seconds: float = 0.3) -> bool:
    """Whether a model is trained faster by itself than side by side with others.

    A convolution of several models is a grouped one, which is computed more slowly. Other models
    gain from company; they are not measured.
    """
    model = initial_model(task, 0, device)
    if not any(p.ndim > 3 for p in model.parameters()):
        return False
    endless = replace(recipe, epochs=10**9)
    four = EnsembleTrainer(task, endless, [Variant(seed) for seed in range(4)], device=device)
    alone = Trainer(task, endless, seed=0, device=device)
    # By processor time, which other processes on the machine do not disturb; a GPU takes none.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    together, by_itself = (
        _rate(trainer, seconds, recipe.batch_size, clock) for trainer in (four, alone)
    )
    return by_itself > CLEARLY * together


def _rate(
    trainer: Trainer | EnsembleTrainer,
    seconds: float,
    batch_size: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Steps per second of all models together, after a first stretch that is not counted."""
    trainer.step()
    _wait(trainer.device)
    first, started = trainer.samples_seen, clock()
    while clock() - started < seconds:
        trainer.step()
    _wait(trainer.device)
    return (trainer.samples_seen - first) / batch_size / (clock() - started)


def _wait(device: torch.device) -> None:
    """Wait until queued work on the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
