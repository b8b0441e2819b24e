"""Attribution: activations times gradient norms."""

from influence_jobs.kinds.attribution.spec import AttributionSpec
from influence_jobs.kinds.base import Kind

KIND = Kind(
    __name__,
    AttributionSpec,
    panel="Norms and scores",
    request="AttributionRequest",
    job="AttributionJob",
    view="AttributionView",
    shard_unit="samples",
    batched=True,
)
