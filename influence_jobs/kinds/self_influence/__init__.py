"""Self-influence: what each training sample does to its own loss."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.self_influence.spec import SelfInfluenceSpec

KIND = Kind(
    __name__,
    SelfInfluenceSpec,
    panel="Norms and scores",
    request="SelfInfluenceRequest",
    job="SelfInfluenceJob",
    view="SelfInfluenceView",
    shard_unit="samples",
    batched=True,
)
