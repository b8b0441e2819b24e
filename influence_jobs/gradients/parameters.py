"""Chosen parameters of a model as one vector, for gradients, curvature and scores."""

import copy
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError


class ParameterSpace:
    """The trained parameters of chosen modules, as one vector of length P in the model's order.

    Frozen parameters (`requires_grad` False when the space is made) do not count. A parameter that
    several modules share counts once, with all its uses, under the first of those that are chosen.

    Args:
        model: Its parameters are looked up anew at every call, so weights may be loaded later.
        modules: Names of modules whose own parameters count (children name theirs themselves); all
            modules if None.

    Raises:
        ModelError: There is no such module, it has no parameters or only frozen ones, or nothing is
            left.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str] | None = None):
        self._model = model
        known = dict(model.named_modules())
        for module in modules or ():
            if module not in known:
                raise ModelError(f"{type(model).__name__} has no module '{module}'")
            own = list(known[module].parameters(recurse=False))
            if not own:
                raise ModelError(f"module '{module}' has no parameters of its own: leave it out")
            if not any(parameter.requires_grad for parameter in own):
                raise ModelError(
                    f"layer '{module}' is frozen (requires_grad is False), so training does not "
                    "change it: leave it out"
                )
        chosen = set(known if modules is None else modules)
        names: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad and name.rpartition(".")[0] in chosen:
                names.setdefault(id(parameter), name)
        self.shapes: dict[str, torch.Size] = {
            name: model.get_parameter(name).shape for name in names.values()
        }
        if not self.shapes:
            raise ModelError(f"{type(model).__name__} has no parameters that are trained")

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules under which parameters count, in order."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.shapes))

    def of(self, model: nn.Module) -> Self:
        """The same parameters of another model, such as a copy in float64."""
        other = copy.copy(self)
        other._model = model
        return other

    @cached_property
    def size(self) -> int:
        """P."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def parameters(self) -> dict[str, Tensor]:
        """The chosen parameters by name, in the model's order."""
        return {name: self._model.get_parameter(name) for name in self.shapes}

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """Views of vectors (..., P) as {name: (..., *shape)}."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        pieces = torch.split(vectors, sizes, dim=-1)
        return {
            name: piece.reshape(*piece.shape[:-1], *shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`: {name: (..., *shape)} to (..., P)."""
        leading = [
            parts[name].flatten(parts[name].ndim - len(shape))
            if shape
            else parts[name].unsqueeze(-1)
            for name, shape in self.shapes.items()
        ]
        return torch.cat(leading, dim=-1)

    def gradient(self, value: Tensor) -> Tensor:
        """Gradient (P,) of a scalar with a graph; zero for parameters that it does not use."""
        parameters = self.parameters()
        gradients = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
        return self.join(dict(zip(parameters, gradients, strict=True)))
