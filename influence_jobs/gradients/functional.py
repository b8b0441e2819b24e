"""`torch.func.functional_call`, which leaves the model as it was."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def functional_call(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...],
    *,
    tie_weights: bool = True,
) -> Any:
    """Call a module with other tensors in place of its parameters and buffers.

    Torch does not put the parameters back of a module that its owner has under two names: the model
    would go on with the other tensors (seen with torch 2.14). Arguments are those of torch.
    """
    own = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    try:
        return torch.func.functional_call(module, dict(tensors), args, tie_weights=tie_weights)
    finally:
        for part, parameters, buffers in own:
            part._parameters.update(parameters)
            part._buffers.update(buffers)
