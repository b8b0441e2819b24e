"""Ablation: retrain without a query's top samples, or with other labels on them."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.specs.base import Count
from influence_jobs.specs.rankings import RetrainingSpec

RelabelRule = Literal["report", "next", "random"]


class AblationSpec(RetrainingSpec):
    """Retrain without a query's top k samples, or with other labels on them, and look at the query.

    Attributes:
        sizes: The numbers k.
        modes: Remove the samples, relabel them, or one after the other.
        relabel: report: all to class 0, or 1 if the query's class is 0; next: each to its class + 1; random: each to
            another class, at random.
    """

    kind: Literal["ablation"] = "ablation"
    sizes: Annotated[tuple[Count, ...], Field(min_length=1)]
    modes: Annotated[tuple[Literal["relabel", "remove"], ...], Field(min_length=1)]
    relabel: RelabelRule = "report"

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        object.__setattr__(self, "sizes", tuple(sorted(set(self.sizes))))
        object.__setattr__(self, "modes", tuple(sorted(set(self.modes))))
        if "relabel" not in self.modes:
            object.__setattr__(self, "relabel", "report")
        return self
