"""s_test vectors of queries."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.specs.base import Spec
from influence_jobs.specs.queries import Queries
from influence_jobs.specs.solvers import AnySolver, ConjugateGradientSettings, Curvature
from influence_jobs.terms import ScorePrecision


class STestSpec(Spec):
    """s_test = (curvature + lambda I)^-1 gradient of each query's quantity, at one checkpoint.

    Attributes:
        modules: Names of the layers whose parameters are used, in the model's order.
        precision: Of weights, samples and vectors in the computation, and of what is stored.
    """

    kind: Literal["s-test"] = "s-test"
    checkpoint: Checkpoint
    modules: Annotated[tuple[str, ...], Field(min_length=1)]
    queries: Queries
    curvature: Curvature = Curvature()
    solver: AnySolver = ConjugateGradientSettings()
    precision: ScorePrecision = "float32"

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        if not self.solver.uses_curvature:  # it uses no matrix, so all matrices are the same
            object.__setattr__(self, "curvature", Curvature())
        if self.curvature.operator not in self.solver.operators:
            raise ValueError(
                f"{self.solver.name} inverts the {self.solver.operators[0]} matrix only: "
                "leave --operator out"
            )
        preconditioner = getattr(self.solver, "preconditioner", "none")
        if preconditioner != "none" and self.curvature.operator != "gauss-newton":
            raise ValueError(
                f"{preconditioner} comes near the gauss-newton matrix only: leave --operator or "
                "--preconditioner out"
            )
        return self
