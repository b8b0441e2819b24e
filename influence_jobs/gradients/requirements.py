"""What a model and its layers must be for the engine to get their per-sample gradients right."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from influence_jobs.errors import ModelError
from influence_jobs.gradients.rules import SUPPORTED, supported


def require_independent_samples(model: nn.Module) -> None:
    """Refuse train mode and batch statistics: there one sample's loss depends on the others.

    Raises:
        ModelError: Naming the first such module.
    """
    for name, module in model.named_modules():
        where = f"module '{name}'" if name else "the model"
        if module.training:
            raise ModelError(
                f"{where} ({type(module).__name__}) is in train mode: call model.eval() first"
            )
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ModelError(
                f"{where} ({type(module).__name__}) has no running statistics, uses the batch's: "
                "samples would influence each other; build it with track_running_stats=True"
            )


def require_supported(name: str, module: nn.Module) -> None:
    """Refuse a layer that has no rule, no weight parameter, or options its rule cannot follow.

    Args:
        name: The module's path in its model, for the message.
        module: The layer.

    Raises:
        ModelError: Naming the layer and its type.
    """
    where = f"layer '{name}' ({type(module).__name__})"
    if not supported(module):
        raise ModelError(f"{where} has no gradient rule; supported: {SUPPORTED} (no subclasses)")
    # A re-parametrised weight (weight_norm, pruning) is an attribute but no parameter.
    weight = module._parameters.get("weight")
    if weight is None:
        raise ModelError(f"{where} has no weight parameter to differentiate: leave it out")
    if not weight.is_floating_point():
        raise ModelError(f"{where} has {_name(weight.dtype)} weights: gradients need floats")
    if isinstance(module, nn.Embedding):
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option) not in (None, False):
                raise ModelError(
                    f"{where} uses {option}, which has no per-sample rule: build it without"
                )


def find_layer(model: nn.Module, name: str, dtype: torch.dtype) -> nn.Module:
    """The layer of that name, if the engine can work on it with weights of type `dtype`.

    Raises:
        ModelError: There is no such module, it is not supported, its weight is of another type or
            shared with another module.
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
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.dtype != dtype:
        raise ModelError(
            f"layer '{name}' has {_name(weight.dtype)} weights, but the precision asked for needs "
            f"{_name(dtype)}: convert model and batch"
        )
    for other, owner in modules.items():
        shares = any(parameter is weight for parameter in owner._parameters.values())
        if shares and owner is not module:
            raise ModelError(
                f"layer '{name}' shares its weight with '{other or type(model).__name__}': its "
                "gradient would mix both uses; untie them"
            )
    return module


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
