"""What gradient norms are of: parameters, named by their layer or by their own full name.

A layer with one weight gives it its name: `fc` is of the parameter `fc.weight`, `attention` of
`attention.in_proj_weight`. Of a layer with several (`rnn`), and of the model itself, each has its
full name: `rnn.weight_ih_l0`, `cls_token`. A weight that several layers share has a name by each
of them. Biases do not count.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients.requirements import require_plain
from influence_jobs.gradients.rules import LayerRule, nearest_rule, supported
from influence_jobs.gradients.rules.reductions import reduce_read, reduced_shape
from influence_jobs.terms import Reduction

# bias, in_proj_bias, bias_ih_l0_reverse, bias_k; not relative_position_bias_table
_BIAS = re.compile(r"(^|_)(bias|b)(\d*|_\w|_l\d+|_(ih|hh)(_l\d+)?(_reverse)?)$")


@dataclass(frozen=True)
class Weight:
    """A parameter whose gradient has norms.

    Attributes:
        name: As it was named.
        parameter: The parameter's full name, by its first owner.
        owner: That module's name.
        rule: Of the owner, or of what its type inherits from: how the weight is read.
        ruled: Whether the gradient may go by the rule, which is for the exact type alone.
        shape: The parameter's.
    """

    name: str
    parameter: str
    owner: str
    rule: LayerRule | None  # type: ignore[type-arg]
    ruled: bool
    shape: torch.Size

    @property
    def read_as(self) -> tuple[int, ...]:
        """The shape (C, I, *kernel) in which the weight is read; without a rule (C, I)."""
        if self.rule is not None:
            return self.rule.kernel_shape
        return (self.shape[0], self.shape[1:].numel()) if self.shape else (1, 1)

    def norm_shape(self, reduction: Reduction) -> tuple[int, ...]:
        """Shape of one sample's norms, for example (96, 3, 3), (96,) or ()."""
        return reduced_shape(self.read_as, reduction)

    def norms(self, gradient: Tensor, reduction: Reduction) -> Tensor:
        """Norms of gradients (B, *shape), as `reduce_read` defines them."""
        if self.rule is not None:
            return reduce_read(self.rule.as_read(gradient), reduction)
        return reduce_read(gradient.reshape(len(gradient), *self.read_as), reduction)


def weight_named(model: nn.Module, name: str) -> Weight:
    """The weight of that name.

    Args:
        model: Any.
        name: Of a layer with one weight, or a parameter's full name.

    Raises:
        ModelError: There is none, or the layer has several, or it is not of floats, or the layer
            has an option that no per-sample gradient can follow.
    """
    modules, parameters = dict(model.named_modules(remove_duplicate=False)), all_parameters(model)
    if name in parameters:
        full = name
    elif name in modules:
        own = own_weights(modules[name])
        where = f"layer '{name}' ({type(modules[name]).__name__})"
        if not own:
            raise ModelError(f"{where} has no weight of its own: {_instead(modules[name], name)}")
        if len(own) > 1:
            listed = ", ".join(full_name(name, one) for one in own)
            raise ModelError(f"{where} has several weights: name one of {listed}")
        full = full_name(name, own[0])
    else:
        raise ModelError(f"no layer '{name}' in {type(model).__name__}; {known_layers(model)}")
    parameter = model.get_parameter(full)
    first = first_names(model)[full]
    owner, _, own_name = first.rpartition(".")
    module = modules[owner]
    if not parameter.is_floating_point():
        kind = str(parameter.dtype).removeprefix("torch.")
        raise ModelError(
            f"layer '{name}' ({type(module).__name__}) has {kind} weights: gradients need floats"
        )
    require_plain(owner, module)
    rule = nearest_rule(module) if own_name == "weight" else None
    ruled = rule is not None and supported(module)
    return Weight(name, first, owner, rule, ruled, parameter.shape)


def own_weights(module: nn.Module) -> list[str]:
    """Names of a module's own parameters that are weights, not biases; of a known type `weight`."""
    own = [name for name, value in module._parameters.items() if value is not None]
    if nearest_rule(module) is not None and "weight" in own:
        return ["weight"]
    return [name for name in own if not _BIAS.search(name)]


def weights_of(model: nn.Module, module: str) -> list[str]:
    """Names of the weights of a module, with those of which its own are made (weight_norm)."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return [
        name_of(model, full_name(part, own))
        for part in with_parametrizations(model, module)
        for own in own_weights(modules[part])
    ]


def name_of(model: nn.Module, parameter: str) -> str:
    """What a weight of that full name is called: as its layer, if it is the only weight there."""
    layer, _, own = parameter.rpartition(".")
    modules = dict(model.named_modules(remove_duplicate=False))
    return layer if layer and own_weights(modules[layer]) == [own] else parameter


def with_parametrizations(model: nn.Module, module: str) -> Iterator[str]:
    """A module's name and those of the modules that its own parameters are made by."""
    yield module
    prefix = full_name(module, "parametrizations.")
    for name, part in model.named_modules(remove_duplicate=False):
        if name.startswith(prefix) and any(True for _ in part.parameters(recurse=False)):
            yield name


def all_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by each of its full names."""
    return dict(model.named_parameters(remove_duplicate=False))


def first_names(model: nn.Module) -> dict[str, str]:
    """By each full name of a parameter the first one, which the model lists it by."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in all_parameters(model).items()}


def ancestors(parameter: str) -> list[str]:
    """The modules that a parameter is in but for the model itself, the smallest first."""
    parts = parameter.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def full_name(module: str, own: str) -> str:
    """The name of what a module has, from the model's root."""
    return f"{module}.{own}" if module else own


def known_layers(model: nn.Module) -> str:
    """The layers of a model that have a rule, as messages list them."""
    known = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if name and supported(module)
    ]
    more = f" and {len(known) - 12} more" if len(known) > 12 else ""
    return f"it has: {', '.join(known[:12])}{more}"


def _instead(module: nn.Module, name: str) -> str:
    inside = any(True for _ in module.parameters())
    return f"name what is inside, '{name}.*'" if inside else "leave it out"
