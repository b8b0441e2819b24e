"""Baselines: simple scores that a method must beat."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.baseline.spec import BaselineSpec

KIND = Kind(
    __name__,
    BaselineSpec,
    panel="Norms and scores",
    request="BaselineRequest",
    job="BaselineJob",
    view="BaselineView",
    shard_unit="samples",
    batched=True,
)
