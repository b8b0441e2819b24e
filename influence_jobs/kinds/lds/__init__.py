"""The linear datamodeling score."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.lds.spec import LdsSpec

KIND = Kind(
    __name__,
    LdsSpec,
    panel="Experiments",
    request="LdsRequest",
    job="LdsJob",
    view="LdsView",
    shard_unit="models",
)
