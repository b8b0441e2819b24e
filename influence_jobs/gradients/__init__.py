"""Per-sample weight-gradient norms: one forward, one truncated backward, a rule per layer type."""

from influence_jobs.gradients.engine import GradNorms
from influence_jobs.gradients.requirements import require_supported
from influence_jobs.gradients.rules import (
    norm_shape,
    reduce_gradient,
    supported,
)

__all__ = [
    "GradNorms",
    "norm_shape",
    "reduce_gradient",
    "require_supported",
    "supported",
]
