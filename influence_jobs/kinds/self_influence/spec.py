"""Self-influence of every training sample."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.specs.base import Seed, Spec
from influence_jobs.specs.solvers import AnySolver, Curvature, EkFacSettings
from influence_jobs.terms import FullPrecision

#: Solvers whose inverse is a quadratic form of a sample's gradient, layer by layer.
SelfSolver = Literal["ek-fac", "identity"]


class SelfInfluenceSpec(Spec):
    """g^T (G + lambda I)^-1 g of the gradient g of every training sample's loss, at a checkpoint.

    Attributes:
        modules: Names of the layers whose parameters are used, in the model's order.
        solver: EK-FAC, or the identity: the squared norm of g.
        precision: Of weights and samples in the computation, and of what is stored; tf32 is
            float32 with products in TF32 on a GPU.
        seed: Seed of the samples' noise.
    """

    kind: Literal["self-influence"] = "self-influence"
    checkpoint: Checkpoint
    modules: Annotated[tuple[str, ...], Field(min_length=1)]
    curvature: Curvature = Curvature()
    solver: AnySolver = EkFacSettings()
    precision: FullPrecision = "float32"
    seed: Seed = 0

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        if self.solver.name not in ("ek-fac", "identity"):
            raise ValueError(
                f"self-influence is computed by ek-fac or identity, not by {self.solver.name}: use "
                "one of them as --solver"
            )
        if not self.solver.uses_curvature:  # it uses no matrix, so all matrices are the same
            object.__setattr__(self, "curvature", Curvature())
        if self.curvature.operator not in self.solver.operators:
            raise ValueError("ek-fac inverts the gauss-newton matrix only: leave --operator out")
        return self
