"""Chosen parameters of a model as one vector, for gradients, curvature and scores."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError


class ParameterSpace:
    """The parameters of chosen layers, flattened in the model's order into vectors of length P.

    Args:
        model: The model. Every call reads its current parameters, so weights may be loaded later.
        modules: Names of the layers' modules. Only a module's own parameters are included, not
            those of its children. None means all modules.

    Raises:
        ModelError: There is no such layer, or it has no parameters of its own; or the model has no
            parameters.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str] | None = None):
        self._model = model
        known = dict(model.named_modules())
        for module in modules or ():
            if module not in known:
                raise ModelError(f"{type(model).__name__} has no layer '{module}'")
            if not any(True for _ in known[module].parameters(recurse=False)):
                raise ModelError(f"layer '{module}' has no parameters of its own: leave it out")
        self.shapes: dict[str, torch.Size] = {
            name: parameter.shape
            for name, parameter in model.named_parameters()  # a shared parameter occurs once
            if modules is None or name.rpartition(".")[0] in modules
        }
        if not self.shapes:
            raise ModelError(f"{type(model).__name__} has no parameters")

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
