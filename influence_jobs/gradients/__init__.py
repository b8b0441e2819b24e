"""Norms, dot products, quadratic forms and projections of per-sample gradients never stored."""

from influence_jobs.gradients.dots import GradDots
from influence_jobs.gradients.engine import GradNorms
from influence_jobs.gradients.metric import Metric
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.projected import GradProjections
from influence_jobs.gradients.quadratics import GradQuadratics
from influence_jobs.gradients.requirements import require_supported
from influence_jobs.gradients.rules import (
    LayerRule,
    MatrixRule,
    norm_shape,
    reduce_gradient,
    supported,
)
from influence_jobs.gradients.tokens import TokenDots, TokenNorms

__all__ = [
    "GradDots",
    "GradNorms",
    "GradProjections",
    "GradQuadratics",
    "LayerRule",
    "MatrixRule",
    "Metric",
    "ParameterSpace",
    "TokenDots",
    "TokenNorms",
    "norm_shape",
    "reduce_gradient",
    "require_supported",
    "supported",
]
