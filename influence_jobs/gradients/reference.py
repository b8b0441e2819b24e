"""Simple and slow per-sample gradients, as a reference for tests."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from influence_jobs.gradients.batches import flattened, has_samples, map_tensors, one_sample
from influence_jobs.gradients.functional import functional_call


class LossModule(nn.Module):
    """A model and its losses as one module, from batch to (B,), for `functional_call`."""

    def __init__(self, model: nn.Module, losses: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._losses = losses

    def forward(self, batch: Any) -> Tensor:
        return self._losses(self.model, batch)


def per_sample_gradients(
    model: nn.Module,
    layers: Sequence[str],
    losses: Callable[[nn.Module, Any], Tensor],
    batch: Any,
) -> dict[str, Tensor]:
    """Weight gradient of every sample's loss, in float64, by vmap over `grad` of one sample.

    Args:
        model: Any model in eval mode; it is copied and not changed.
        layers: Module names.
        losses: (model, batch) to one loss per sample (B,).
        batch: Tensors whose first axis has length B are per sample; all else is shared.

    Returns:
        {layer: (B, *weight shape)}. The gradients of the whole batch are in memory at once.
    """
    with torch.no_grad():
        size = len(losses(model, batch))
    model = copy.deepcopy(model).double().requires_grad_(False)
    weights = {name: model.get_submodule(name).weight for name in layers}
    leaves, structure = flattened(doubled(batch))
    mapped = [isinstance(leaf, Tensor) and has_samples(leaf, size) for leaf in leaves]
    axes = [0 if of_sample else None for of_sample in mapped]

    def loss(weights: dict[str, Any], *leaves: Any) -> Tensor:
        sample = [
            leaf if axis is None else leaf.unsqueeze(0)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        parameters = {f"model.{name}.weight": weight for name, weight in weights.items()}
        result: Tensor = functional_call(
            LossModule(model, losses), parameters, (pytree.tree_unflatten(sample, structure),)
        )
        return result.squeeze(0)

    gradients: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, *axes))(weights, *leaves)
    return gradients


def gradients_one_by_one(
    model: nn.Module,
    parameters: Sequence[str],
    losses: Callable[[nn.Module, Any], Tensor],
    batch: Any,
) -> dict[str, Tensor]:
    """Gradient of every sample's loss by any parameters, in float64, one sample at a time.

    Args:
        model: Any model in eval mode; it is copied and not changed.
        parameters: Names of the parameters.
        losses: (model, batch) to one loss per sample (B,).
        batch: As for `per_sample_gradients`.

    Returns:
        {parameter: (B, *shape)}; zero if the loss does not depend on the parameter.
    """
    with torch.no_grad():
        size = len(losses(model, batch))
    model = copy.deepcopy(model).double().requires_grad_(False)
    chosen = [model.get_parameter(name).requires_grad_(True) for name in parameters]
    rows = []
    for i in range(size):
        loss = losses(model, one_sample(doubled(batch), i, size)).squeeze(0)
        rows.append(torch.autograd.grad(loss, chosen, materialize_grads=True))
    return {
        name: torch.stack(of) for name, of in zip(parameters, zip(*rows, strict=True), strict=True)
    }


def doubled(batch: Any) -> Any:
    """A batch with its floating-point tensors in float64."""
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)
