"""Which memory format suits a model."""

import torch
from torch import Tensor, nn

from influence_jobs.gradients.transforms import differentiable_kernels
from influence_jobs.memory import is_out_of_memory
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.placement import copy_of, device_of, to_device, to_type

AGREEMENT = 1e-3  # relative difference of the losses; rounding makes 1e-6
_ANSWER = "_channels_last"  # kept in the task's object, which may have no hash


def in_fast_layout(task: Task, model: nn.Module) -> nn.Module:
    """The model in channels_last if it has 2-D convolutions and computes the same there.

    Convolutions and the rules for their gradients are faster in it. A model that reshapes with
    `view`, or has weights of five axes, stays as it is. The answer is kept by task, for all its
    models.
    """
    kept = vars(task)
    if _ANSWER not in kept:
        kept[_ANSWER] = _same_in_channels_last(task, model)
    if not kept[_ANSWER]:
        return model
    found: nn.Module = model.to(memory_format=torch.channels_last)
    return found


def _same_in_channels_last(task: Task, model: nn.Module) -> bool:
    axes = {parameter.ndim for parameter in model.parameters()}
    if 4 not in axes or max(axes) > 4:
        return False
    trial = copy_of(model).eval()
    dtype = next(trial.parameters()).dtype
    ids = torch.arange(min(2, len(task.train_data())))
    batch = to_type(to_device(task.batch(ids, Draw(0)), device_of(trial)), dtype)
    expected = _losses(task, trial, batch)
    try:
        found = _losses(task, trial.to(memory_format=torch.channels_last), batch)
    except RuntimeError as error:
        if is_out_of_memory(error):  # the answer would be kept
            raise
        return False
    difference = (found - expected).abs().max()
    return bool(difference <= AGREEMENT * expected.abs().max())


def _losses(task: Task, model: nn.Module, batch: object) -> Tensor:
    with torch.enable_grad(), differentiable_kernels(model):
        losses_B = task.losses(model, batch)
        # A view may fail in the backward pass only.
        losses_B.sum().backward()  # type: ignore[no-untyped-call]
    return losses_B.detach()
