"""Which layers a model has, in the order in which data flow through them."""

import re
from collections.abc import Sequence

import torch
from torch import nn

from influence_jobs.errors import SpecError
from influence_jobs.gradients.rules import nearest_rule
from influence_jobs.tasks.base import Draw, Task, device_of, to_device


def weight_layers(task: Task, model: nn.Module) -> list[str]:
    """Module names of the layers with a number, in forward order; `--layer 1` is the first.

    Numbered are the types whose `LayerRule` says so, and what inherits from them. The order is
    taken from a forward pass of one sample, since registration order need not be it.
    """
    order: list[str] = []

    def note(name: str) -> None:
        if name not in order:
            order.append(name)

    hooks = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: note(name))
        for name, module in model.named_modules()
        if (rule := nearest_rule(module)) is not None and rule.numbered
    ]
    training = model.training
    try:
        with torch.no_grad():
            sample = task.batch(torch.tensor([0]), Draw(seed=0))
            task.losses(model.eval(), to_device(sample, device_of(model)))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return order


def resolve_layers(wanted: Sequence[str | int], task: Task) -> tuple[str, ...]:
    """Turn what the user typed (numbers, module names, `all`) into module names in forward order.

    Raises:
        SpecError: A number is out of range or a name unknown; the message names the valid ones.
    """
    model = task.model()
    order = weight_layers(task, model)
    modules = dict(model.named_modules())
    names: list[str] = []
    for word in map(str, wanted):
        if word == "all":
            names += order
        elif re.fullmatch(r"-?\d+", word):
            number = int(word)
            if not 1 <= number <= len(order):
                raise SpecError(f"layer {number} does not exist: the layers are {_numbered(order)}")
            names.append(order[number - 1])
        elif word in modules and word:
            names.append(word)
        else:
            raise SpecError(f"layer {word!r} does not exist: the layers are {_numbered(order)}")
    registration = {name: i for i, name in enumerate(modules)}
    position = {name: i for i, name in enumerate(order)}
    # Layers without a number (BatchNorm, Embedding, ...) follow, as the model lists them.
    return tuple(sorted(set(names), key=lambda n: (position.get(n, len(order)), registration[n])))


def _numbered(order: Sequence[str]) -> str:
    return ", ".join(f"{i} ({name})" for i, name in enumerate(order, start=1))
