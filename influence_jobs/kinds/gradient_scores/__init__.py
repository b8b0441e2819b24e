"""Scores from stored projected gradients."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.gradient_scores.spec import GradientScoresSpec

KIND = Kind(
    __name__,
    GradientScoresSpec,
    panel="Norms and scores",
    request="GradientScoresRequest",
    job="GradientScoresJob",
    view="GradientScoresView",
    shard_unit="samples",
)
