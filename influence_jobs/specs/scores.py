"""Specs of runs with a score for every (query, training sample)."""

from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, SerializeAsAny

from influence_jobs.specs.base import Spec, spec_of
from influence_jobs.specs.queries import Queries


class ScoresSpec(Spec):
    """Base of the specs of runs with a score for every (query, training sample).

    Attributes:
        queries: The queries, one a row of the scores. A subclass has them as a field or a property.
    """

    if TYPE_CHECKING:  # at run time pydantic would take the property for a field's default

        @property
        def queries(self) -> Queries: ...

    @property
    def top_only(self) -> int | None:
        """How many samples of each end have a score; None: all samples have one."""
        return None


#: A spec of any kind whose runs have scores.
AnyScores = Annotated[SerializeAsAny[ScoresSpec], BeforeValidator(spec_of)]
