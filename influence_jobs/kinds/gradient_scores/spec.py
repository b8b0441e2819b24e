"""Scores from stored projected gradients."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.kinds.gradient_index.spec import DAMPING, GradientIndexSpec
from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.kinds.query_gradients.spec import QueryGradientsSpec
from influence_jobs.specs.base import Count
from influence_jobs.specs.queries import Queries
from influence_jobs.specs.scores import ScoresSpec
from influence_jobs.terms import GradientMethod


class GradientScoresSpec(ScoresSpec):
    """Scores of training samples whose projected gradients are stored; larger = more helpful.

    Attributes:
        gradients: The stores, at one or several checkpoints or trainings.
        queries: The queries. Their gradients are projected as those of the samples.
        method: `influence`: q^T (G + lambda I)^-1 g in each layer, with G the mean of g g^T.
            `trak`: the same for gradients of the margin, times 1 - p. `dot`: q^T g. `cosine`: the
            cosine of the two.
        damping: Lambda, as a part of the mean eigenvalue of a layer's G; 0 if the method has none.
        combine: Scores of several stores are summed (over checkpoints) or averaged (over seeds).
        keep_modules: Also keep the scores of each layer.
        approximate: Only so many of the most helpful and of the most harmful samples, found in an
            index; the others have no score.
    """

    kind: Literal["gradient-scores"] = "gradient-scores"
    gradients: Annotated[tuple[GradientsSpec, ...], Field(min_length=1)]
    queries: Queries
    method: GradientMethod = "influence"
    damping: Annotated[float, Field(ge=0)] = 0.1
    combine: Literal["sum", "mean"] = "sum"
    keep_modules: bool = False
    approximate: Count | None = None

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        # The order changes neither a sum nor a mean.
        ordered = tuple(sorted(self.gradients, key=lambda store: store.run_id))
        object.__setattr__(self, "gradients", ordered)
        first = ordered[0]
        if len({store.run_id for store in ordered}) < len(ordered):
            raise ValueError("a run of gradients is named twice")
        for store in ordered:
            if store.modules != first.modules or store.whole != first.whole:
                raise ValueError(f"{store.run_id} has other layers than {first.run_id}")
            if store.task.identity() != first.task.identity():
                raise ValueError(f"{store.run_id} is of another task or data than {first.run_id}")
        if len(ordered) == 1:
            object.__setattr__(self, "combine", "sum")
        if self.method not in DAMPING:
            object.__setattr__(self, "damping", 0.0)
        if self.keep_modules and self.method == "cosine":
            raise ValueError("a cosine is not a sum over layers: leave --keep-layers out")
        if self.approximate and len(ordered) > 1:
            raise ValueError("an index is of one store: leave --approximate out")
        if self.approximate and self.keep_modules:
            raise ValueError(
                "an index has no scores of single layers: leave --approximate or --keep-layers out"
            )
        return self

    @property
    def top_only(self) -> int | None:
        return self.approximate

    @property
    def index(self) -> GradientIndexSpec | None:
        """The index in which samples are found."""
        if self.approximate is None:
            return None
        (store,) = self.gradients
        return GradientIndexSpec(
            task=self.task, gradients=store, method=self.method, damping=self.damping
        )

    @property
    def of_queries(self) -> tuple[QueryGradientsSpec, ...]:
        """The runs with the queries' gradients, in the order of `gradients`."""
        return tuple(
            QueryGradientsSpec(task=self.task, gradients=store, queries=self.queries)
            for store in self.gradients
        )
