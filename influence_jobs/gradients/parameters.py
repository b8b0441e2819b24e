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
    several modules share counts once, with all its uses: for its first owner if that is chosen,
    else for the first of those that are.

    Args:
        model: Its parameters are looked up anew at every call, so weights may be loaded later.
        modules: Names of modules whose own parameters count (children name theirs themselves), and
            full names of parameters; all modules if None.

    Attributes:
        shapes: By full name, in the model's order; a shared one has the name of its first owner.
        groups: By entry of `modules`, the full names that count for it.

    Raises:
        ModelError: There is no such module, it has no parameters or only frozen ones, or nothing is
            left.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str] | None = None):
        self._model = model
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        trained = [name for name, value in model.named_parameters() if value.requires_grad]
        if modules is None:
            modules = list(dict.fromkeys(name.rpartition(".")[0] for name in trained))
        named = {
            entry: [first[id(parameter)] for parameter in _own(model, entry)] for entry in modules
        }
        for entry, names in named.items():
            if not set(names) & set(trained):
                raise ModelError(
                    f"layer '{entry}' is frozen (requires_grad=False), and only trained parameters "
                    "count: leave it out, or let the model train it"
                )
        owner_of: dict[str, str] = {}
        for name in trained:
            entries = [entry for entry, names in named.items() if name in names]
            if entries:
                owner = name.rpartition(".")[0]
                owner_of[name] = owner if owner in entries else entries[0]
        self.shapes: dict[str, torch.Size] = {
            name: model.get_parameter(name).shape for name in owner_of
        }
        self.groups: dict[str, list[str]] = {
            entry: [name for name, owner in owner_of.items() if owner == entry] for entry in modules
        }
        if not self.shapes:
            raise ModelError(
                f"{type(model).__name__} has no trained parameters: set requires_grad of some to "
                "True"
            )

    @property
    def modules(self) -> tuple[str, ...]:
        """The entries for which parameters count, in order."""
        return tuple(entry for entry, names in self.groups.items() if names)

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
        """Views of vectors (..., P) as `{name: (..., *shape)}`."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        pieces = torch.split(vectors, sizes, dim=-1)
        return {
            name: piece.reshape(*piece.shape[:-1], *shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`: `{name: (..., *shape)}` to (..., P)."""
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


def _own(model: nn.Module, entry: str) -> list[nn.Parameter]:
    """A module's own parameters, or a parameter."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if entry in modules:
        own = list(modules[entry].parameters(recurse=False))
        if not own:
            raise ModelError(f"layer '{entry}' has no parameters of its own: leave it out")
        return own
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if entry not in parameters:
        raise ModelError(f"{type(model).__name__} has no layer '{entry}'")
    return [parameters[entry]]
