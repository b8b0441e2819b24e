"""Stability of rankings over trainings."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.specs.base import Count, Spec
from influence_jobs.specs.queries import Queries
from influence_jobs.specs.rankings import Ranking, require_alike


class StabilitySpec(Spec):
    """How much of a ranking remains when the model is trained from other seeds.

    Attributes:
        methods: For each method its rankings from several trainings. The first ranking is compared
            with each of the others.
        top: Number of top samples that are compared.
    """

    kind: Literal["stability"] = "stability"
    methods: Annotated[
        tuple[Annotated[tuple[Ranking, ...], Field(min_length=2)], ...], Field(min_length=1)
    ]
    top: Count = 100

    @model_validator(mode="after")
    def _rankings_are_alike(self) -> Self:
        require_alike(tuple(rankings[0] for rankings in self.methods), self.task)
        for rankings in self.methods:
            for ranking in rankings:
                if ranking.name != rankings[0].name or ranking.largest != rankings[0].largest:
                    raise ValueError(f"{ranking.name} is compared with {rankings[0].name}")
                require_alike((rankings[0].model_copy(update={"name": ""}), ranking), self.task)
        return self

    @property
    def queries(self) -> Queries:
        """The queries of all rankings."""
        return self.methods[0][0].queries
