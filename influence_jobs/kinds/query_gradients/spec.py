"""Projected gradients of queries."""

from typing import Literal

from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.specs.base import Spec
from influence_jobs.specs.queries import Queries


class QueryGradientsSpec(Spec):
    """The gradients of queries, projected as those of the samples of a store.

    Attributes:
        gradients: The store.
        queries: The queries, one a row.
    """

    kind: Literal["query-gradients"] = "query-gradients"
    gradients: GradientsSpec
    queries: Queries
