"""Losses whose Hessian in the outputs has a closed form, as the Gauss-Newton matrix needs."""

from collections.abc import Callable
from typing import Final

from torch import Tensor
from torch.nn import functional as F

from influence_jobs.terms import OutputLoss


def cross_entropy(outputs_BC: Tensor, classes_B: Tensor) -> Tensor:
    """Cross-entropy (B,) of logits, or of log-probabilities, which log-softmax does not change."""
    return F.cross_entropy(outputs_BC, classes_B, reduction="none")


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error (B,) over all outputs (B, ...) of a sample."""
    return (outputs - targets).square().flatten(1).mean(1)


def _cross_entropy_hessian(outputs_BC: Tensor, tangents_BC: Tensor) -> Tensor:
    """(diag(p) - p p^T) u / B with the probabilities p, for logits and log-probabilities alike."""
    weighted_BC = outputs_BC.softmax(1)
    weighted_BC = weighted_BC * (tangents_BC - (weighted_BC * tangents_BC).sum(1, keepdim=True))
    return weighted_BC / len(outputs_BC)


def _mean_squared_error_hessian(outputs: Tensor, tangents: Tensor) -> Tensor:
    """2 u / (B x number of outputs of a sample)."""
    return tangents * (2 / outputs.numel())


OUTPUT_LOSSES: Final[dict[OutputLoss, Callable[[Tensor, Tensor], Tensor]]] = {
    "cross-entropy": cross_entropy,
    "mse": mean_squared_error,
}

# (outputs, u) -> u times the Hessian, in the outputs, of the mean loss over the batch.
OUTPUT_HESSIANS: Final[dict[OutputLoss, Callable[[Tensor, Tensor], Tensor]]] = {
    "cross-entropy": _cross_entropy_hessian,
    "mse": _mean_squared_error_hessian,
}
