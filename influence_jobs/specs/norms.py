"""Requests whose runs have gradient norms: replayed, or recorded while training."""

from abc import abstractmethod
from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from influence_jobs.specs.base import Spec, spec_of
from influence_jobs.terms import Reduction


class NormsSpec(Spec):
    """Base of the requests whose runs have gradient norms."""

    @property
    @abstractmethod
    def layers_with_norms(self) -> tuple[str, ...]:
        """Names of the modules."""

    @property
    @abstractmethod
    def norms_reduction(self) -> Reduction:
        """What a sample's norms of one layer are kept as."""


#: A request for norms, of whichever kind.
AnyNorms = Annotated[SerializeAsAny[NormsSpec], BeforeValidator(spec_of)]
