"""Running statistics of batch normalisation, as numbers that a training moves like its weights.

In train mode a layer normalises by the statistics of its batch, and moves its running statistics
towards them: r' = (1 - f) r + f s. The trained model, in eval mode, normalises by r. So an output
of the trained model depends on every batch of the training through r, too.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from influence_jobs.errors import ModelError
from influence_jobs.tasks.base import copy_of

STATISTICS = ("running_mean", "running_var")
# By the name of a buffer, for each call of its layer in turn: its factor f and the batch's s.
Moves = list[tuple[str, float, Tensor]]


class EvalNorm(nn.Module):
    """A batch normalisation in eval mode, whose running statistics are parameters."""

    def __init__(self, norm: _BatchNorm):
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.running_mean = nn.Parameter(norm.running_mean.clone())
        self.running_var = nn.Parameter(norm.running_var.clone())
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, ...)."""
        shape = (1, -1, *[1] * (input.ndim - 2))
        scale = (self.running_var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        centred = (input - self.running_mean.view(shape)) * scale.view(shape)
        return centred if self.bias is None else centred + self.bias.view(shape)


def with_statistics(model: nn.Module) -> nn.Module:
    """A copy of a trained model in eval mode, with its running statistics as parameters.

    They keep their names.
    """
    model = copy_of(model).eval()
    for name, norm in list(moving(model)):
        if not name:
            return EvalNorm(norm).eval()
        model.set_submodule(name, EvalNorm(norm).eval())
    return model


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
