"""Indexes of stored projected gradients, for approximate top samples."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.gradient_index.spec import GradientIndexSpec

KIND = Kind(
    __name__,
    GradientIndexSpec,
    panel="Norms and scores",
    request="GradientIndexRequest",
    job="GradientIndexJob",
    view="GradientIndexView",
)
