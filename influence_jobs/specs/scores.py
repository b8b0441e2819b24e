"""Requests whose result is a score for every (query, training sample)."""

from abc import abstractmethod
from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from influence_jobs.specs.base import Spec, spec_of
from influence_jobs.specs.queries import Queries


class ScoresSpec(Spec):
    """Base of the requests that give a score to every (query, training sample)."""

    @property
    @abstractmethod
    def asked(self) -> Queries:
        """The queries of the rows."""


#: A request for scores, of whichever kind.
AnyScores = Annotated[SerializeAsAny[ScoresSpec], BeforeValidator(spec_of)]
