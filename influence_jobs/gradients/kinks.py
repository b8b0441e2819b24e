"""Samples at a kink of a ReLU or a maximum, where rounding decides which gradient they have.

In a batch torch may round in another way than for one sample. Then the gradients of a sample alone
and in its batch differ, and both are right. In float64 rounding is too small to decide.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from influence_jobs.gradients.batches import one_sample
from influence_jobs.gradients.functional import functional_call
from influence_jobs.gradients.reference import LossModule, doubled
from influence_jobs.gradients.transforms import differentiable_kernels
from influence_jobs.memory import is_out_of_memory

AGREE = 1e-6  # of the norm of a gradient in float64


def lies_at_a_kink(
    model: nn.Module,
    losses: Callable[[nn.Module, Any], Tensor],
    parameters: Collection[Tensor],
    batch: Any,
    i: int,
    size: int,
) -> bool:
    """Whether a sample's gradient is the same alone and in its batch once rounding is negligible.

    If so, its loss does not depend on other samples, nor on how many there are. False as well if
    the model does not run in float64.

    Args:
        model: In eval mode; it is not changed.
        losses: (model, batch) to one loss per sample (B,).
        parameters: Those by which gradients are taken.
        batch: B samples.
        i: The sample.
        size: B.
    """
    doubles = {id(parameter): parameter.detach().double() for parameter in model.parameters()}
    wanted = [doubles[id(parameter)].requires_grad_() for parameter in parameters]
    # Each module once: of a module with two names torch would not put the weights back.
    state: dict[str, Any] = {}
    for place, module in LossModule(model, losses).named_modules():
        for name, parameter in module.named_parameters(place, recurse=False):
            state[name] = doubles[id(parameter)]
        state |= {name: doubled(b) for name, b in module.named_buffers(place, recurse=False)}

    def gradient(samples: Any, of: int) -> Tensor:
        module = LossModule(model, losses)
        found = functional_call(module, state, (doubled(samples),), tie_weights=False)
        gradients = torch.autograd.grad(found[of], wanted, materialize_grads=True)
        return torch.cat([g.flatten() for g in gradients])

    try:
        with torch.enable_grad(), differentiable_kernels(model):
            alone, together = gradient(one_sample(batch, i, size), 0), gradient(batch, i)
    except (RuntimeError, TypeError, ValueError) as error:  # what is for float32 alone
        if is_out_of_memory(error):
            raise
        return False
    return bool((alone - together).norm() <= AGREE * alone.norm())
