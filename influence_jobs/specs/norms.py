"""Specs of runs with gradient norms, either replayed or recorded during training."""

from abc import abstractmethod
from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from influence_jobs.specs.base import Spec, spec_of
from influence_jobs.terms import Reduction


class NormsSpec(Spec):
    """Base of the specs of runs with gradient norms."""

    @property
    @abstractmethod
    def layers_with_norms(self) -> tuple[str, ...]:
        """Names of the layers that have norms, in forward order."""

    @property
    @abstractmethod
    def norms_reduction(self) -> Reduction:
        """The axes of a sample's norms that are kept; see `terms.Reduction`."""


#: A spec of any kind whose runs have norms.
AnyNorms = Annotated[SerializeAsAny[NormsSpec], BeforeValidator(spec_of)]
