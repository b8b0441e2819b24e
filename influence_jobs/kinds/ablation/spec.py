"""Ablation: remove or relabel a query's top samples, and retrain."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.specs.base import Count
from influence_jobs.specs.rankings import RetrainingSpec

RelabelRule = Literal["report", "next", "random"]


class AblationSpec(RetrainingSpec):
    """Remove or relabel a query's top k samples, retrain, and measure the query.

    Attributes:
        sizes: The numbers k.
        modes: What is done to the samples; each mode has its own trainings.
        relabel: The new labels. report: class 0, or class 1 for queries of class 0, as in the
            research report; next: own class + 1; random: a random other class.
        same_run: Samples are masked (`training.changes.Changes`) rather than removed, so the order
            of the others, their batches and all random numbers stay as they were. Relabelling
            leaves them so anyway.
    """

    kind: Literal["ablation"] = "ablation"
    sizes: Annotated[tuple[Count, ...], Field(min_length=1)]
    modes: Annotated[tuple[Literal["relabel", "remove"], ...], Field(min_length=1)]
    relabel: RelabelRule = "report"
    same_run: bool = False

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        object.__setattr__(self, "sizes", tuple(sorted(set(self.sizes))))
        object.__setattr__(self, "modes", tuple(sorted(set(self.modes))))
        if "relabel" not in self.modes:
            object.__setattr__(self, "relabel", "report")
        if "remove" not in self.modes:
            object.__setattr__(self, "same_run", False)
        return self
