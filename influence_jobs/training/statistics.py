"""Running statistics of batch normalisation, as numbers that a training moves like its weights.

In train mode a layer normalises by the statistics of its batch, and moves its running statistics
towards them: r' = (1 - f) r + f s. The trained model, in eval mode, normalises by r. So an output
of the trained model depends on every batch of the training through r, too.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from influence_jobs.errors import ModelError
from influence_jobs.tasks.placement import copy_of

STATISTICS = ("running_mean", "running_var")
# By the name of a buffer, for each call of its layer in turn: its factor f and the batch's s.
Moves = list[tuple[str, float, Tensor]]


def with_statistics(model: nn.Module) -> nn.Module:
    """A copy of a trained model in eval mode, with its running statistics as parameters.

    They keep their names. Torch's own batch normalisation has no derivative by them.
    """
    model = copy_of(model).eval()
    for _, norm in moving(model):
        for name in STATISTICS:
            value = norm._buffers.pop(name)
            assert value is not None
            norm.register_parameter(name, nn.Parameter(value))
        norm.forward = MethodType(_normalised, norm)  # type: ignore[method-assign]
    return model


def _normalised(norm: _BatchNorm, input: Tensor) -> Tensor:
    """The outputs (B, C, ...) of a batch normalisation in eval mode."""
    shape = (1, -1, *[1] * (input.ndim - 2))
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = (variance + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    centred = (input - mean.view(shape)) * scale.view(shape)
    return centred + norm.bias.view(shape) if norm.affine else centred


def moving(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """The layers with running statistics that a training moves, by name."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield name, module


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics that a training moves, by name."""
    return {
        f"{name}.{own}".lstrip("."): getattr(norm, own)
        for name, norm in moving(model)
        for own in STATISTICS
    }


def require_plain_average(model: nn.Module) -> None:
    """Refuse a layer whose running statistics are a plain mean over all batches.

    Raises:
        ModelError: It names the layer.
    """
    for name, norm in moving(model):
        if norm.momentum is None:
            raise ModelError(
                f"layer '{name}' ({type(norm).__name__}) has momentum=None, a mean over all "
                "batches: unrolled needs a moving average, build it with momentum=0.1"
            )


@contextmanager
def watched(model: nn.Module) -> Iterator[Moves]:
    """Collect what a forward pass in train mode moves running statistics towards."""
    moves: Moves = []

    def hook(name: str) -> Any:
        def note(module: _BatchNorm, args: Any, kwargs: dict[str, Any]) -> None:
            if not module.training:
                return
            x = args[0] if args else kwargs["input"]
            axes = [axis for axis in range(x.ndim) if axis != 1]
            variance, mean = torch.var_mean(x, axes)
            assert module.momentum is not None
            for own, found in zip(STATISTICS, (mean, variance), strict=True):
                moves.append((f"{name}.{own}".lstrip("."), module.momentum, found))

        return note

    with ExitStack() as stack:
        for name, norm in moving(model):
            handle = norm.register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield moves
