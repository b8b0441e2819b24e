"""Projected gradients of samples or queries, stored."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.gradients.spec import GradientsSpec

KIND = Kind(
    __name__,
    GradientsSpec,
    panel="Norms and scores",
    request="GradientsRequest",
    job="GradientsJob",
    view="GradientsView",
    shard_unit="samples",
    batched=True,
)
