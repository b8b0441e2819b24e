"""Trainings that a task does itself (`Task.train`)."""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError, SpecError
from influence_jobs.models.checkpoints import put_weights
from influence_jobs.tasks.base import Draw, Task, call_own
from influence_jobs.training.changes import Changes, replaced
from influence_jobs.training.train import initial_model, seeded


def trained_by_task(task: Task, seed: int, device: torch.device, changes: Changes) -> nn.Module:
    """The model that the task's own `train` gives, in eval mode.

    torch's generators are seeded for it, and are as before afterwards.

    Raises:
        SpecError: These changes cannot be made, or the weights are not finite.
        ModelError: What `train` returns is no state dict of the task's model.
    """
    changes.check(task, by_task=True)
    ids = changes.order(torch.arange(len(task.train_data())))
    labels = {}
    if len(changes.relabelled):
        require_relabels(task)
        labels = {"labels": _labels(task, ids, changes)}
    with seeded(seed, device):
        state = call_own(task, "train", ids, seed, **labels)
    name = type(task).__name__
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ModelError(
            f"train() of {name} returns {type(state).__name__}, not a state dict: return "
            "model.state_dict()"
        )
    for key, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise SpecError(
                f"train() of {name} returns weights that are not finite ({key}; seed {seed}, "
                f"{len(ids):,} samples): its training diverged"
            )
    model = initial_model(task, seed, device)
    put_weights(
        model,
        state,
        name=f"the state dict that train() of {name} returns",
        cure="return model.state_dict() of the model that model() gives",
    )
    return model.eval()


def require_relabels(task: Task) -> None:
    """Refuse to relabel samples for a training that takes no labels.

    Raises:
        SpecError: The task's own `train` takes none.
    """
    takes = inspect.signature(type(task).train).parameters
    if "labels" not in takes:
        raise SpecError(
            f"train() of {type(task).__name__} takes no labels, so its samples cannot be "
            "relabelled: let it take labels=None, or use --mode remove"
        )


def _labels(task: Task, ids: Tensor, changes: Changes) -> Tensor:
    """The classes to train the samples `ids` (n,) with."""
    new_labels_N = changes.new_labels(len(task.train_data()))
    assert new_labels_N is not None
    own = [task.targets(task.batch(some, Draw(0))) for some in torch.split(ids, task.batch_size)]
    return replaced(torch.cat(own), new_labels_N[ids])
