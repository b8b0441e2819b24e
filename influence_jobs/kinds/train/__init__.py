"""The training of one model of a task."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.train.spec import TrainSpec

KIND = Kind(
    __name__,
    TrainSpec,
    panel="Training",
    request="TrainRequest",
    job="TrainJob",
    view="TrainView",
    workers=False,
)
