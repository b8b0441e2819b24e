"""Projected gradients of queries."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.query_gradients.spec import QueryGradientsSpec

KIND = Kind(
    __name__,
    QueryGradientsSpec,
    panel="Norms and scores",
    request="QueryGradientsRequest",
    job="QueryGradientsJob",
    view="QueryGradientsView",
)
