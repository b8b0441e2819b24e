"""Which layers' rules serve a parameter: all that hold it, if its uses are their calls.

A gradient is a sum over the uses of its parameter: the calls of one layer, or of several layers
that share it. Each call's part follows from that layer's rule.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from influence_jobs.gradients.rules import rule_of, supported
from influence_jobs.gradients.usage import Usage


class Held(NamedTuple):
    """A layer that holds a parameter, and what the parameter is called there."""

    layer: str
    own: str


def holders(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, list[Held]]:
    """By parameter, the layers that hold it."""
    held: dict[int, list[Held]] = {}
    for layer, module in model.named_modules():
        for own, parameter in module._parameters.items():
            held.setdefault(id(parameter), []).append(Held(layer, own))
    return {name: held.get(id(parameter), []) for name, parameter in parameters.items()}


def why_not_by_rules(
    parameter: Tensor, held: Iterable[Held], modules: Mapping[str, nn.Module], usage: Usage
) -> str:
    """What speaks against the sum over the calls of a parameter's layers; empty if nothing does.

    Args:
        held: Its holders.
        modules: The model's.
        usage: Shows a forward of the model. It looked at the holders.
    """
    held = list(held)
    for layer, own in held:
        module = modules[layer]
        known = {name for name, _ in module.named_parameters()} <= {"weight", "bias"}
        if own not in ("weight", "bias") or not supported(module) or not known:
            return f"no rule for {own} of {type(module).__name__}"
    if not all(usage.calls(layer) for layer, _ in held):
        return "a layer that has it is not called"  # and may be in a later batch
    if not usage.only_in_calls(parameter, [layer for layer, _ in held]):
        return "it is used outside of its layer, or the layer has the samples in another order"
    if any(own == "weight" for _, own in held) and not _read_alike(parameter, held, modules):
        return "the layers that share it read it differently"
    return ""


def _read_alike(parameter: Tensor, held: list[Held], modules: Mapping[str, nn.Module]) -> bool:
    """Whether all holders read a weight as the same matrix."""
    if len(held) == 1:
        return True
    if any(own != "weight" for _, own in held):
        return False
    numbers = torch.arange(parameter.numel()).view(1, *parameter.shape)
    first, *others = (rule_of(modules[layer]).as_matrix(numbers) for layer, _ in held)
    return all(torch.equal(first, other) for other in others)
