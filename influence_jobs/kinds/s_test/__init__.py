"""s_test vectors: query gradients times the inverse of the curvature."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.s_test.spec import STestSpec

KIND = Kind(
    __name__,
    STestSpec,
    panel="Norms and scores",
    request="STestRequest",
    job="STestJob",
    view="STestView",
    shard_unit="samples",
    batched=True,
)
