"""Norms, dot products and quadratic forms of per-sample gradients, which are not stored."""

from influence_jobs.gradients.dots import GradDots
from influence_jobs.gradients.engine import GradNorms
from influence_jobs.gradients.metric import Metric
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.quadratics import GradQuadratics
from influence_jobs.gradients.requirements import require_supported
from influence_jobs.gradients.rules import (
    LayerRule,
    MatrixRule,
    norm_shape,
    reduce_gradient,
    supported,
)

__all__ = [
    "GradDots",
    "GradNorms",
    "GradQuadratics",
    "LayerRule",
    "MatrixRule",
    "Metric",
    "ParameterSpace",
    "norm_shape",
    "reduce_gradient",
    "require_supported",
    "supported",
]
