"""Where models and batches are, and in which number format they are computed."""

import copy

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError, first_line
from influence_jobs.gradients.batches import map_tensors
from influence_jobs.memory import is_out_of_memory
from influence_jobs.tasks.base import Batch, Draw, Task
from influence_jobs.transfers import on_device


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor of a batch; nothing waits for the copies to a GPU."""
    return map_tensors(lambda t: on_device(t, device), batch)


def to_type(batch: Batch, dtype: torch.dtype) -> Batch:
    """A batch with its floating-point tensors in another type."""
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)


def out_of_half(batch: Batch, model: nn.Module) -> Batch:
    """A batch for a model that was `converted` from half precision; other tensors stay as given."""
    dtype = next(model.parameters()).dtype
    half = (torch.bfloat16, torch.float16)
    if dtype in half:
        return batch
    return map_tensors(lambda t: t.to(dtype) if t.dtype in half else t, batch)


def dtype_of(model: nn.Module) -> torch.dtype:
    """What computations with a model are done in: float64 if it is built in it, else float32.

    Half precision would cost about a hundredth of a norm, and conjugate gradients altogether.
    """
    double = any(value.dtype == torch.float64 for value in model.parameters())
    return torch.float64 if double else torch.float32


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's weights."""
    return next(model.parameters()).device


def copy_of(model: nn.Module) -> nn.Module:
    """A copy of a model, also of one that keeps a result of autograd, such as weight_norm's."""
    kept = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    # Such a tensor cannot be copied as it is; the forward pass computes it anew.
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in kept})


def converted(
    task: Task, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[nn.Module, bool]:
    """A task's untrained model in eval mode, and whether its samples must be converted too.

    Args:
        dtype: Of its weights; by default `dtype_of` it.

    Raises:
        ModelError: The model is built in another dtype and does not run in this one.
    """
    model = task.model()
    dtype = dtype or dtype_of(model)
    types = {value.dtype for value in model.parameters() if value.is_floating_point()}
    model = model.to(device, dtype).eval()
    converts = bool(types - {dtype})
    if converts:
        sample = to_device(task.batch(torch.tensor([0]), Draw(0)), device)
        try:
            with torch.no_grad():
                task.losses(model, to_type(sample, dtype))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            names = ", ".join(sorted(str(t).removeprefix("torch.") for t in types - {dtype}))
            raise ModelError(
                f"{type(model).__name__} is built in {names} and does not run in "
                f"{str(dtype).removeprefix('torch.')} ({first_line(error)}): let its "
                "forward follow the dtype of its weights, and leave .to(dtype) to the training"
            ) from error
    return model, converts
