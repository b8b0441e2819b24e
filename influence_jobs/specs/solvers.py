"""Settings of the curvature and of each solver. A solver is found by its name."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from influence_jobs.specs.base import Count, Model, Positive, Seed

Operator = Literal["gauss-newton", "hessian"]


class Curvature(Model):
    """The curvature matrix of the mean training loss.

    Attributes:
        operator: Gauss-Newton is positive semidefinite; the Hessian of a network is not.
        product: How the Hessian is multiplied: exactly (Pearlmutter) or by finite differences.
        samples: Size of the random subset of training samples that is used; None for all.
        seed: Seed of the subset, the mini-batches and the samples' noise.
    """

    operator: Operator = "gauss-newton"
    product: Literal["exact", "finite-difference"] = "exact"
    samples: Count | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def _gauss_newton_is_exact(self) -> Self:
        if self.operator == "gauss-newton" and self.product != "exact":
            raise ValueError("finite differences need the Hessian: use --operator hessian")
        return self


class SolverSettings(Model):
    """Base of the settings of a solver. The default of the field `name` names the solver.

    A field's description is the help of the option of that name.

    Attributes:
        solver: `module:Class` in `influence_jobs.curvature` that takes these settings.
        summary: The solver in a few words.
        passes: Approximate number of products with all samples, on the MNIST network; for time
            estimates.
        operators: The matrices that it can invert.
        uses_curvature: False if the solver multiplies with no matrix.
        inverts: False if s_test is not (A + lambda I)^-1 times the query's gradient, but one vector
            for each segment of a training.
        asked: Settings that a request gives if the user says nothing, where the default is what
            earlier runs had.
    """

    solver: ClassVar[str]
    summary: ClassVar[str]
    passes: ClassVar[int]
    operators: ClassVar[tuple[Operator, ...]] = ("gauss-newton", "hessian")
    uses_curvature: ClassVar[bool] = True
    inverts: ClassVar[bool] = True
    asked: ClassVar[Mapping[str, Any]] = {}
    by_name: ClassVar[dict[str, type["SolverSettings"]]] = {}

    name: str

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        name = cls.model_fields["name"].default
        if isinstance(name, str):
            SolverSettings.by_name[name] = cls

    @property
    def needs_factors(self) -> bool:
        """Whether layers without Kronecker factors must be named to be taken."""
        return False

    @property
    def num_repeats(self) -> int:
        """Number of independent solutions; s_test is their mean."""
        return getattr(self, "repeats", 1)


class DampedSettings(SolverSettings):
    """Base of the settings of a solver of (A + lambda I) x = v.

    Attributes:
        damping: Lambda, the effective damping; None for `damping_share` of the largest eigenvalue.
        damping_share: Runs made before there was a choice have .04. A request has .001: by their
            schedule trainings by SGD of hundreds to thousands of steps have 1e-4 to 1e-3.
    """

    asked = {"damping_share": 0.001}  # noqa: RUF012  (a ClassVar of the base)

    damping: Positive | None = None
    damping_share: Annotated[
        Positive,
        Field(
            description="Lambda as a part of the largest eigenvalue, if neither --damping nor the "
            "schedule of a training says it."
        ),
    ] = 0.04

    @model_validator(mode="after")
    def _one_lambda(self) -> Self:
        if self.damping is not None:
            object.__setattr__(self, "damping_share", 0.04)
        return self


class ConjugateGradientSettings(DampedSettings):
    """Batched conjugate gradients to a relative residual."""

    solver = "cg:ConjugateGradient"
    summary = "batched conjugate gradients, the default"
    passes = 20

    name: Literal["cg"] = "cg"
    tolerance: Annotated[float, Field(gt=0, lt=1, description="Relative residual.")] = 1e-4
    max_iterations: Annotated[Count, Field(description="Upper limit of the iterations.")] = 200


class LissaSettings(DampedSettings):
    """Stochastic recursion; see `curvature.lissa`. A None is chosen from the measured spectrum.

    The recursion itself uses damping / scale.

    Attributes:
        batch_size: Samples in a step.
        repeats: Independent recursions; s_test is their mean.
    """

    solver = "lissa:Lissa"
    summary = "stochastic recursion, the default if one of its settings is given"
    passes = 10

    name: Literal["lissa"] = "lissa"
    scale: Annotated[
        Positive | None, Field(description="Scale of the recursion; measured if not given.")
    ] = None
    depth: Annotated[
        Count | None, Field(description="Steps of a recursion; chosen if not given.")
    ] = None
    batch_size: Annotated[
        Count | None, Field(description="Samples in a step; chosen if not given.")
    ] = None
    repeats: Annotated[Count, Field(description="Independent recursions, averaged.")] = 5


class EkFacSettings(DampedSettings):
    """Eigenvalue-corrected Kronecker factors (George et al. 2018).

    Attributes:
        targets: See `curvature.EkFac`. Runs made before there was a choice have sampled ones.
    """

    solver = "ek_fac:EkFac"
    summary = "eigenvalue-corrected Kronecker factors"
    passes = 3
    operators = ("gauss-newton",)
    asked = {**DampedSettings.asked, "targets": "auto"}  # noqa: RUF012  (a ClassVar of the base)

    name: Literal["ek-fac"] = "ek-fac"
    targets: Annotated[
        Literal["auto", "exact", "sampled"],
        Field(
            description="Curvature of the loss in the outputs: all of it (exact), a random root "
            "for each sample (sampled), or exact where outputs and samples are few (auto)."
        ),
    ] = "sampled"

    @property
    def needs_factors(self) -> bool:
        return True


class SourceSettings(SolverSettings):
    """Influence through the training, cut into segments; see `curvature.source`.

    The checkpoints are those that the train run keeps up to the one that is asked for, shared out
    evenly, in order. A segment ends with its last checkpoint.
    """

    solver = "source:Source"
    summary = "through the stored checkpoints of a training by SGD (SOURCE)"
    passes = 3
    operators = ("gauss-newton",)
    inverts = False

    name: Literal["source"] = "source"
    segments: Annotated[
        Count, Field(description="Stretches of training, each with a curvature of its own.")
    ] = 3
    exponential: Annotated[
        Literal["ek-fac", "chebyshev"],
        Field(
            description="How functions of the curvature are computed: in the eigenbasis of "
            "EK-FAC, or by a series of products, which is slow and does without its "
            "approximation."
        ),
    ] = "ek-fac"

    @property
    def needs_factors(self) -> bool:
        return self.exponential == "ek-fac"


class IdentitySettings(SolverSettings):
    """No curvature: s_test is the query's gradient itself."""

    solver = "identity:Identity"
    summary = "no curvature"
    passes = 1
    uses_curvature = False

    name: Literal["identity"] = "identity"


def _settings_of(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    name = value.get("name")
    if not isinstance(name, str) or name not in SolverSettings.by_name:
        known = ", ".join(SolverSettings.by_name)
        raise ValueError(f"there is no solver {name!r}; there are {known}")
    return SolverSettings.by_name[name].model_validate(value)


#: Settings of any solver.
AnySolver = Annotated[SerializeAsAny[SolverSettings], BeforeValidator(_settings_of)]
