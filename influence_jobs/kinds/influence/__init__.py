"""Influence: s_test times the gradient of every training sample."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.influence.spec import InfluenceSpec

KIND = Kind(
    __name__,
    InfluenceSpec,
    panel="Norms and scores",
    request="InfluenceRequest",
    job="InfluenceJob",
    view="InfluenceView",
    shard_unit="samples",
    batched=True,
)
