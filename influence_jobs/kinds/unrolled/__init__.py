"""Exact influence through the training of one run."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.unrolled.spec import UnrolledSpec

KIND = Kind(
    __name__,
    UnrolledSpec,
    panel="Norms and scores",
    request="UnrolledRequest",
    job="UnrolledJob",
    view="UnrolledView",
)
