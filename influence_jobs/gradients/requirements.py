"""Checks of a model and its layers that their per-sample gradients will be right."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from influence_jobs.errors import ModelError
from influence_jobs.gradients.rules import (
    LayerRule,
    nearest_rule,
    rule_of,
    supported,
    supported_layers,
)


def require_independent_samples(model: nn.Module) -> None:
    """Refuse train mode and batch statistics, which make a sample's loss depend on other samples.

    Raises:
        ModelError: It names the first such module.
    """
    for name, module in model.named_modules():
        where = f"module '{name}'" if name else "the model"
        if module.training:
            raise ModelError(
                f"{where} ({type(module).__name__}) is in train mode: call model.eval() first"
            )
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ModelError(
                f"{where} ({type(module).__name__}) has no running statistics and uses the "
                "batch's: samples would influence each other; build it with "
                "track_running_stats=True"
            )


def gradient_hooks(
    model: nn.Module, parameters: Iterable[Tensor], *, backward: bool = False
) -> str:
    """What is wrong with parameters whose gradients hooks may change, or nothing if none has any.

    Args:
        parameters: Some of the model's.
        backward: Look also at the hooks that `backward()` alone calls, as in a training.
    """
    # torch tells of such hooks in no public way.
    kinds = {"_backward_hooks": "register_hook"}
    if backward:
        kinds["_post_accumulate_grad_hooks"] = "register_post_accumulate_grad_hook"
    asked = {id(parameter) for parameter in parameters}
    for name, parameter in model.named_parameters():
        for attribute, method in kinds.items():
            if id(parameter) in asked and getattr(parameter, attribute, None):
                return (
                    f"parameter '{name}' has a gradient hook ({method}), so its gradient may be "
                    "another than the loss's: register no hook in model(); to hold numbers of a "
                    "weight fixed, keep them in a buffer and the others in a parameter of their own"
                )
    return ""


def require_supported(name: str, module: nn.Module) -> None:
    """Refuse a layer with no rule, no weight parameter, or an option that its rule refuses.

    Args:
        name: The module's name in its model, for the message.
        module: The layer.

    Raises:
        ModelError: It names the layer and its type.
    """
    where = f"layer '{name}' ({type(module).__name__})"
    if not supported(module):
        raise ModelError(
            f"{where} has no gradient rule; supported: {supported_layers()} "
            "(and subclasses that change nothing)"
        )
    # A re-parametrised weight (weight_norm, pruning) is an attribute but not a parameter.
    weight = module._parameters.get("weight")
    if weight is None:
        raise ModelError(f"{where} has no weight parameter to differentiate: leave it out")
    if not weight.is_floating_point():
        raise ModelError(f"{where} has {_name(weight.dtype)} weights: gradients need floats")
    require_plain(name, module)


def require_plain(name: str, module: nn.Module) -> None:
    """Refuse a layer with an option that is refused by its rule or by the rule of a base class.

    Raises:
        ModelError: It names the layer and the option.
    """
    rule = nearest_rule(module)
    for option in rule.refused_options if rule else ():
        if getattr(module, option) not in (None, False):
            raise ModelError(
                f"layer '{name}' ({type(module).__name__}) uses {option}, which has no per-sample "
                "rule: build the layer without it"
            )


def find_rule(model: nn.Module, name: str, dtypes: Sequence[torch.dtype]) -> LayerRule[Any]:
    """The rule of the layer with this name, for engines that work in `dtype`.

    Raises:
        ModelError: There is no such layer, it is not supported, or its weight has another dtype or
            is shared with another module.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name not in modules:
        known = [other for other, module in modules.items() if supported(module)]
        more = f" and {len(known) - 12} more" if len(known) > 12 else ""
        raise ModelError(
            f"no layer '{name}' in {type(model).__name__}; it has: {', '.join(known[:12])}{more}"
        )
    module = modules[name]
    require_supported(name, module)
    rule = rule_of(module)
    weight = rule.weight
    require_dtype(name, weight, dtypes)
    for other, owner in modules.items():
        shares = any(parameter is weight for parameter in owner._parameters.values())
        if shares and owner is not module:
            raise ModelError(
                f"layer '{name}' shares its weight with '{other or type(model).__name__}': its "
                "gradient would mix both uses; untie them"
            )
    return rule


def require_dtype(name: str, weight: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Refuse weights of other dtypes than the engine works with.

    Raises:
        ModelError: It names the layer and both dtypes.
    """
    if weight.dtype not in dtypes:
        raise ModelError(
            f"layer '{name}' has {_name(weight.dtype)} weights, but this precision needs "
            f"{' or '.join(map(_name, dtypes))}: convert model and batch"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
