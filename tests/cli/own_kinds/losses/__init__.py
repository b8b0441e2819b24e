"""A kind of one's own, as little as a kind can be: the loss of every training sample."""

from influence_jobs.kinds.base import Kind

from .spec import LossesSpec

KIND = Kind(
    __name__,
    LossesSpec,
    panel="Norms and scores",
    request="LossesRequest",
    job="LossesJob",
    view="LossesView",
    shard_unit="samples",
    batched=True,
)
