"""Where models and batches are, and in which number format they are computed."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from influence_jobs.errors import ModelError, first_line
from influence_jobs.gradients.batches import map_tensors, plain_leaves
from influence_jobs.memory import is_out_of_memory
from influence_jobs.tasks.base import Batch, Draw, Task
from influence_jobs.transfers import on_device


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor of a batch; nothing waits for the copies to a GPU."""
    return map_tensors(lambda t: on_device(t, device), batch)


def to_type(batch: Batch, dtype: torch.dtype) -> Batch:
    """A batch with its floating-point tensors in another type."""
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)


def widened(batch: Batch, dtype: torch.dtype) -> Batch:
    """A batch with those of its floating-point tensors in another type that are of a narrower one.

    Wider ones stay: a task may take a difference of large numbers before it rounds.
    """
    bits = torch.finfo(dtype).bits

    def wide(value: Tensor) -> Tensor:
        narrow = value.is_floating_point() and torch.finfo(value.dtype).bits < bits
        return value.to(dtype) if narrow else value

    return map_tensors(wide, batch)


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


def is_wider(batch: Batch, dtype: torch.dtype) -> bool:
    """Whether a batch has floating-point tensors of a wider type."""
    bits, leaves = torch.finfo(dtype).bits, plain_leaves(batch)
    floats = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
    return any(torch.finfo(t.dtype).bits > bits for t in floats)


@torch.no_grad()
def runs(task: Task, model: nn.Module, batch: Batch) -> bool:
    """Whether a model takes a batch as it is; a float32 one that is built in float64 does not."""
    try:
        task.losses(model, batch)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


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


def built_model(task: Task) -> nn.Module:
    """A task's untrained model.

    Raises:
        ModelError: Its layers cannot be looked into, or have no weights yet.
    """
    model = task.model()
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"model() of {type(task).__name__} gives a scripted model, whose layers are hidden: "
            "give the module that was scripted"
        )
    for name, module in model.named_modules():
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise ModelError(
                f"layer '{name}' ({type(module).__name__}) has no weights before its first batch: "
                f"pass one through the model in model() of {type(task).__name__}"
            )
    return model


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model, changed in place, with weights of another type and buffers that suit them.

    `Module.to(dtype)` takes the imaginary part from complex buffers, and rounds a float64 buffer of
    a float32 model, such as a time of origin: the model would be another one.
    """
    double = dtype_of(model) == torch.float64

    def suited(value: Tensor) -> Tensor:
        if value.is_complex():
            if dtype == torch.float64:
                return value.to(torch.complex128)
            return value.to(torch.complex64) if double else value
        if not value.is_floating_point() or (value.dtype == torch.float64 and not double):
            return value
        return value.to(dtype)

    model._apply(suited)  # type: ignore[no-untyped-call]
    return model


def converted(
    task: Task, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[nn.Module, Callable[[Batch], Batch]]:
    """A task's untrained model in eval mode, and what brings samples into a type that it takes.

    Args:
        dtype: Of its weights; by default `dtype_of` it.

    Raises:
        ModelError: The model is built in another dtype and does not run in this one; or as
            `built_model`.
    """
    model = built_model(task)
    dtype = dtype or dtype_of(model)
    types = {value.dtype for value in model.parameters() if value.is_floating_point()} - {dtype}
    model = in_dtype(model.to(device), dtype).eval()
    if not types:
        return model, lambda batch: batch
    widens = all(torch.finfo(one).bits < torch.finfo(dtype).bits for one in types)
    fitting = partial(widened if widens else to_type, dtype=dtype)
    sample = to_device(task.batch(torch.tensor([0]), Draw(0)), device)
    try:
        with torch.no_grad():
            task.losses(model, fitting(sample))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        names = ", ".join(sorted(str(t).removeprefix("torch.") for t in types))
        raise ModelError(
            f"{type(model).__name__} is built in {names} and does not run in "
            f"{str(dtype).removeprefix('torch.')} ({first_line(error)}): let its "
            "forward follow the dtype of its weights, and leave .to(dtype) to the training"
        ) from error
    return model, fitting
