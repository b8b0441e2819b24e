"""The layers of a model, in forward order, and their numbers."""

import re
from collections.abc import Sequence

import torch
from torch import nn

from influence_jobs.errors import SpecError
from influence_jobs.gradients.rules import nearest_rule
from influence_jobs.tasks.base import Draw, Task, device_of, to_device


def weight_layers(task: Task, model: nn.Module) -> list[str]:
    """Module names of the numbered layers, in forward order; `--layer 1` is the first.

    A layer has a number if the `LayerRule` of its type, or of a type it inherits from, says so. One
    sample is passed through the model to find the order, which may differ from the order of
    registration.
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
    """Turn numbers, module names and `all` from the user into module names in forward order.

    Raises:
        SpecError: A number is out of range or a name is unknown; the message lists the layers.
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
    # Layers without a number (BatchNorm, Embedding, ...) come last, in order of registration.
    return tuple(sorted(set(names), key=lambda n: (position.get(n, len(order)), registration[n])))


def _numbered(order: Sequence[str]) -> str:
    return ", ".join(f"{i} ({name})" for i, name in enumerate(order, start=1))
