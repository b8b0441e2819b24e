"""Checks of a task, on a few samples before the first product, that its curvature will be right."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from influence_jobs.errors import DataError, ModelError
from influence_jobs.gradients.batches import one_sample
from influence_jobs.gradients.one_loss_each import mixed_losses, wrong_losses
from influence_jobs.memory import is_out_of_memory
from influence_jobs.tasks.base import Batch, Task
from influence_jobs.tasks.output_loss import SUM_ERROR, Form, alike, which_forms_give
from influence_jobs.transfers import numbers


@torch.no_grad()
def require_deterministic(task: Task, model: nn.Module, batch: Batch, again: Batch) -> None:
    """Refuse losses that change between two passes over the same samples, fetched twice.

    Raises:
        ModelError: The losses differ.
        DataError: A loss is not finite.
    """
    losses_B, again_B = task.losses(model, batch), task.losses(model, again)
    finite, same = numbers([losses_B.isfinite().all(), alike(losses_B, again_B)])
    if not finite:
        raise DataError(
            "the training loss of the first samples is not finite: check the checkpoint"
        )
    if not same:
        raise ModelError(
            f"two passes over the same samples of {type(task).__name__} give different losses: "
            "switch dropout off in eval mode, and draw noise from the Draw and the sample's id only"
        )


@torch.no_grad()
def require_output_loss(
    task: Task, model: nn.Module, batch: Batch, forms: Sequence[Form]
) -> tuple[Form, ...]:
    """The forms of the declared loss that give the losses of a batch.

    Args:
        forms: What is left of the forms that the task's `output_loss` may have.

    Raises:
        ModelError: None does.
        SpecError: The task defines no outputs.
    """
    right = agreeing_forms(task, model, batch, task.losses(model, batch), forms).tolist()
    return those_left(task, model, batch, forms, right)


@torch.no_grad()
def agreeing_forms(
    task: Task, model: nn.Module, batch: Batch, losses_B: Tensor, forms: Sequence[Form]
) -> Tensor:
    """Which of F forms give a batch's losses, (F,), on the device; nothing waits for it.

    Raises:
        ModelError, SpecError: The task defines no outputs, or what is no tensor.
    """
    if wrong := wrong_losses(losses_B):
        raise ModelError(wrong)
    outputs, targets = task.outputs(model, batch), task.targets(batch)
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"outputs() of {type(task).__name__} gives {type(outputs).__name__}, not a tensor: "
            "return the logits or values themselves"
        )
    return which_forms_give(losses_B, outputs, targets, forms)


@torch.no_grad()
def those_left(
    task: Task, model: nn.Module, batch: Batch, forms: Sequence[Form], right: Sequence[bool]
) -> tuple[Form, ...]:
    """The forms that are right.

    Args:
        batch: A few samples, for the message.

    Raises:
        ModelError: None is.
    """
    found = tuple(form for form, gives in zip(forms, right, strict=True) if gives)
    if not found:
        outputs, targets = task.outputs(model, batch), task.targets(batch)
        raise ModelError(
            _wrong_targets(task, outputs, targets)
            or _mixed_losses(task, model, batch, len(outputs))
            or f"losses() of {type(task).__name__} does not give the {_named(task)} of outputs() "
            f"{tuple(outputs.shape)} and targets() {tuple(targets.shape)}, as output_loss says: "
            "make the three agree, or define output_loss as a method (self, outputs, targets) -> "
            "losses"
        )
    return found


def _named(task: Task) -> str:
    return task.output_loss if isinstance(task.output_loss, str) else "output_loss"


@torch.no_grad()
def require_own_losses(task: Task, model: nn.Module, batch: Batch) -> None:
    """Require that a sample's loss is the same alone, as far as the first samples show.

    Raises:
        ModelError: It is not.
    """
    losses_B = task.losses(model, batch)
    if wrong := wrong_losses(losses_B) or _mixed_losses(task, model, batch, len(losses_B)):
        raise ModelError(wrong)


def _mixed_losses(task: Task, model: nn.Module, batch: Batch, size: int) -> str:
    """How the losses of the first samples depend on others of the batch, or nothing."""
    losses_B = task.losses(model, batch)
    if len(losses_B) == 1 < size:
        return wrong_losses(losses_B, torch.Size([size]))
    if len(losses_B) != size:  # outputs of positions
        return ""
    try:
        alone_B = torch.cat(
            [task.losses(model, one_sample(batch, i, size)) for i in range(min(size, 2))]
        )
    except Exception as error:  # a batch that cannot be cut
        if is_out_of_memory(error):
            raise
        return ""
    together_B = losses_B[: len(alone_B)]
    if alone_B.shape != together_B.shape or alike(alone_B, together_B):
        return ""
    return mixed_losses(alone_B, together_B, size)


def _wrong_targets(task: Task, outputs: Tensor, targets: Tensor) -> str:
    """What is wrong with the shape or type of the targets, or nothing."""
    shape, size = tuple(targets.shape), len(outputs)
    if task.output_loss == "mse" and targets.shape != outputs.shape:
        return (
            f"targets() has shape {shape}, outputs() {tuple(outputs.shape)}: give both the same "
            "shape, or one is broadcast against the other"
        )
    if task.output_loss == "cross-entropy" and outputs.ndim == 2:
        if targets.is_floating_point() and targets.shape == outputs.shape:  # probabilities
            if (targets.sum(1) - 1).abs().max() > SUM_ERROR:
                return (
                    "targets() are weights of the classes that do not sum to 1: divide each "
                    "sample's by their sum"
                )
            return ""
        if shape != (size,):
            return f"targets() has shape {shape}, not ({size},): give each sample its class"
        if targets.is_floating_point():
            return f"targets() is {targets.dtype}: classes are whole numbers, use .long()"
    return ""


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
