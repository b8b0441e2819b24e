"""Checks of a task, on a few samples before the first product, that its curvature will be right."""

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from influence_jobs.curvature.output_loss import OUTPUT_LOSSES
from influence_jobs.errors import DataError, ModelError
from influence_jobs.tasks.base import Batch, Task

RELATIVE_ERROR = 1e-3  # allowed for float32 and another order of summation


@torch.no_grad()
def require_deterministic(task: Task, model: nn.Module, batch: Batch, again: Batch) -> None:
    """Refuse losses that change between two passes over the same samples, fetched twice.

    Raises:
        ModelError: The losses differ.
        DataError: A loss is not finite.
    """
    losses_B, again_B = task.losses(model, batch), task.losses(model, again)
    if not losses_B.isfinite().all():
        raise DataError(
            "the training loss of the first samples is not finite: check the checkpoint"
        )
    if not _close(losses_B, again_B):
        raise ModelError(
            f"two passes over the same samples of {type(task).__name__} give different losses: "
            "switch dropout off in eval mode, and draw noise from the Draw and the sample's id only"
        )


@torch.no_grad()
def require_output_loss(task: Task, model: nn.Module, batch: Batch) -> None:
    """Refuse a task whose losses are not the `output_loss` of its outputs and targets.

    Raises:
        ModelError: The losses differ, or the task declares no `output_loss`.
        SpecError: The task defines no outputs.
    """
    name = type(task).__name__
    outputs = task.outputs(model, batch)
    if task.output_loss is None:
        raise ModelError(
            f"{name} declares no output_loss, which the Gauss-Newton matrix needs: set it to "
            f"{' or '.join(map(repr, OUTPUT_LOSSES))}, or use --operator hessian"
        )
    if task.output_loss == "cross-entropy" and outputs.ndim != 2:
        raise ModelError(
            f"outputs of {name} have shape {tuple(outputs.shape)}, but cross-entropy is of logits "
            "(B, C): reshape them, or use --operator hessian"
        )
    declared_B = OUTPUT_LOSSES[task.output_loss](outputs, task.targets(batch))
    losses_B = task.losses(model, batch)
    if losses_B.shape != declared_B.shape or not _close(losses_B, declared_B):
        raise ModelError(
            f"losses of {name} are not the {task.output_loss} of its outputs and targets, as its "
            "output_loss says: correct one of them, or use --operator hessian"
        )


def saved_bytes(task: Task, model: nn.Module, batch: Batch) -> int:
    """Bytes of activations that a backward pass over a batch needs, at least one per sample."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(note, lambda tensor: tensor):
        num_samples = len(task.losses(model, batch))
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    return max(num_samples, sum(sizes.values()))


def _close(a_B: Tensor, b_B: Tensor) -> bool:
    # Relative to the largest loss, since a loss near zero may be a difference of large numbers.
    difference = (a_B - b_B).abs().max()
    return bool(difference <= RELATIVE_ERROR * torch.maximum(a_B.abs().max(), b_B.abs().max()))
