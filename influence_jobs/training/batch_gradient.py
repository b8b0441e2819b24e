"""The gradient of a batch's loss with its graph, to be differentiated once more."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from influence_jobs.curvature.batch_curvature import DIFFERENCES
from influence_jobs.curvature.derivatives import agreement, padding_rows, without_rows
from influence_jobs.curvature.requirements import saved_bytes
from influence_jobs.errors import ModelError, first_line
from influence_jobs.gradients.requirements import gradient_hooks
from influence_jobs.gradients.transforms import all_derivatives
from influence_jobs.memory import is_out_of_memory
from influence_jobs.tasks.base import Batch, Task
from influence_jobs.tasks.placement import copy_of, to_type
from influence_jobs.training.changes import require_one_each
from influence_jobs.training.statistics import Moves, watched
from influence_jobs.training.train import seeded
from influence_jobs.transfers import numbers

MAX_BYTES = 2**30  # largest memory for activations times vectors in a pass


@dataclass(frozen=True)
class BatchGradient:
    """The gradient of the mean loss of a batch, (1/B) sum_i w_i l_i, at weights w_i = 1.

    Attributes:
        loss: The mean loss, a scalar on its device.
        parameters: All trained ones.
        gradients: Of those that have one.
        weights_B: w.
        moves: Of running statistics.
    """

    loss: Tensor
    parameters: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    weights_B: Tensor
    moves: Moves


def batch_gradient(
    task: Task, model: nn.Module, batch: Batch, *, size: int, seed: int, device: torch.device
) -> BatchGradient:
    """The gradient in train mode, with the random numbers of a seed.

    Args:
        size: B.

    Raises:
        ModelError: The losses are not one a sample.
    """
    with all_derivatives(model):
        with seeded(seed, device), watched(model) as moves:
            losses_B = task.losses(model, batch)
        require_one_each(losses_B, torch.Size([size]))
        weights_B = torch.ones_like(losses_B, requires_grad=True)
        loss = (weights_B * losses_B).mean()
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(
            loss, [*parameters.values()], create_graph=True, allow_unused=True
        )
    # As in the trainer: the optimizer skips a parameter without a gradient.
    gradients = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
    return BatchGradient(loss.detach(), parameters, gradients, weights_B, moves)


class SecondDerivatives:
    """Derivatives of batch gradients along Q vectors, by the parameters and by w.

    Args:
        task: Gives the losses.
        model: In train mode.
        batch: A batch to look at the model with, and the arguments of `batch_gradient` for it.

    Raises:
        ModelError: torch cannot differentiate the gradient, or does it wrongly.
    """

    def __init__(self, task: Task, model: nn.Module, batch: Batch, **arguments: Any):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if hooked := gradient_hooks(model, trained, backward=True):
            raise ModelError(hooked)  # second derivatives meet it twice, or not at all
        self._model = model
        self._sample_bytes = -(-saved_bytes(task, model, batch) // arguments["size"])
        self._batched = _look(batch_gradient(task, model, batch, **arguments), model)
        if not _agrees_with_differences(task, model, batch, **arguments):
            raise ModelError(
                f"second derivatives of {type(model).__name__} differ from finite differences: "
                "torch cannot differentiate the backward pass of one of its operations, such as "
                "weight_norm, or of your own operation with detach() in it; replace the "
                "operation, or use infl submit influence"
            )

    def __call__(
        self, graph: BatchGradient, outputs: Sequence[Tensor], along: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Derivatives of the sum of outputs times vectors.

        Args:
            outputs: Values of the graph, such as its gradients.
            along: For each of them the vectors, (Q, *shape).

        Returns:
            By the parameters, {name: (Q, *shape)}; and by w, (Q, B).
        """
        inputs = [*graph.parameters.values(), graph.weights_B]
        count = len(along[0])
        at_once = MAX_BYTES // (len(graph.weights_B) * self._sample_bytes)
        at_once = max(1, at_once) if self._batched else 1
        pieces = []
        with all_derivatives(self._model):
            for first in range(0, count, at_once):
                some = [vectors[first : first + at_once] for vectors in along]
                keep = first + at_once < count
                pieces.append(_derivatives(outputs, inputs, some, self._batched, keep=keep))
        *by_parameters, by_weights_QB = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return dict(zip(graph.parameters, by_parameters, strict=True)), by_weights_QB


def _derivatives(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    along: Sequence[Tensor],
    batched: bool,
    *,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Derivatives of outputs along Q vectors, by each of the inputs: (Q, *shape).

    Args:
        batched: By one pass for all vectors.
        keep: Keep the graph.
    """
    count = len(along[0])
    if batched:
        found = torch.autograd.grad(
            outputs, inputs, along, retain_graph=keep, is_grads_batched=True, allow_unused=True
        )
        return tuple(
            x.new_zeros(count, *x.shape) if derivative is None else derivative
            for x, derivative in zip(inputs, found, strict=True)
        )
    rows = [
        torch.autograd.grad(
            outputs,
            inputs,
            [vectors[i] for vectors in along],
            retain_graph=keep or i < count - 1,
            materialize_grads=True,
        )
        for i in range(count)
    ]
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def _look(graph: BatchGradient, model: nn.Module) -> bool:
    """Whether one pass for all vectors gives what one for each gives.

    Raises:
        ModelError: torch cannot differentiate the gradient.
    """
    outputs, inputs = [*graph.gradients.values()], [*graph.parameters.values(), graph.weights_B]
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(2, *g.shape, generator=generator).to(g) for g in outputs]
    with all_derivatives(model):
        try:
            expected = _derivatives(outputs, inputs, along, batched=False, keep=True)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"torch cannot differentiate the gradient of {type(model).__name__} "
                f"({first_line(error)}): replace the operation, or use infl submit "
                "influence"
            ) from error
        try:
            found = _derivatives(outputs, inputs, along, batched=True, keep=True)
        except RuntimeError as error:  # an operation that vmap does not know
            if is_out_of_memory(error):
                raise
            return False
    apart = _square(*(a - b for a, b in zip(found, expected, strict=True)))
    return apart <= agreement() ** 2 * _square(*expected)


def _agrees_with_differences(task: Task, model: nn.Module, batch: Batch, **arguments: Any) -> bool:
    """Whether the Hessian along one vector is the slope of the gradient there, in float64.

    Where the backward of an operation cannot be differentiated, autograd may take the missing
    derivative for zero without a word.
    """
    exact = copy_of(model).double()
    batch = to_type(batch, torch.float64)
    graph = batch_gradient(task, exact, batch, **arguments)
    generator = torch.Generator().manual_seed(0)
    vectors = {
        name: torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g)
        for name, g in graph.gradients.items()
    }
    vectors = without_rows(vectors, padding_rows(exact, graph.parameters))
    weights = {name: graph.parameters[name].detach().clone() for name in vectors}
    length = math.sqrt(_square(*vectors.values()))
    scale = math.sqrt(_square(*weights.values())) / length
    rounding = 1e-6 * length * math.sqrt(_square(*graph.gradients.values()))
    with all_derivatives(exact):
        found = torch.autograd.grad(
            [*graph.gradients.values()],
            [graph.parameters[name] for name in vectors],
            [*vectors.values()],
            materialize_grads=True,
        )

    def at(size: float) -> list[Tensor]:
        with torch.no_grad():
            for name, vector in vectors.items():
                graph.parameters[name].copy_(weights[name] + size * vector)
        moved = batch_gradient(task, exact, batch, **arguments).gradients
        return [gradient.detach() for gradient in moved.values()]

    for size in (part * scale for part in DIFFERENCES):
        slopes = [(a - b) / (2 * size) for a, b in zip(at(size), at(-size), strict=True)]
        apart = math.sqrt(_square(*(a - b for a, b in zip(found, slopes, strict=True))))
        # One that agrees is enough: another may cross the kink of a ReLU.
        if apart <= agreement() * math.sqrt(_square(*slopes)) + rounding:
            return True
    return False


def _square(*tensors: Tensor) -> float:
    """The sum of all squares."""
    return sum(numbers(values.detach().double().square().sum() for values in tensors))
