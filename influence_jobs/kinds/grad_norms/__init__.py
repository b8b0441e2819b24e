"""Per-sample gradient norms."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec

KIND = Kind(
    __name__,
    GradNormsSpec,
    panel="Norms and scores",
    request="GradNormsRequest",
    job="GradNormsJob",
    view="GradNormsView",
    shard_unit="samples",
    batched=True,
)
