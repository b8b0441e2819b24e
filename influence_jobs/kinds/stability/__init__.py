"""Stability of rankings over training seeds."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.stability.spec import StabilitySpec

KIND = Kind(
    __name__,
    StabilitySpec,
    panel="Experiments",
    request="StabilityRequest",
    job="StabilityJob",
    view="StabilityView",
)
