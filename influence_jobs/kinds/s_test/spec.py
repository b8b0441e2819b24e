"""s_test vectors of queries."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.kinds.train.spec import Checkpoint, TrainedCheckpoint
from influence_jobs.specs.base import Spec
from influence_jobs.specs.queries import Queries
from influence_jobs.specs.solvers import (
    AnySolver,
    ConjugateGradientSettings,
    Curvature,
    SourceSettings,
)
from influence_jobs.terms import FullPrecision


class STestSpec(Spec):
    """s_test = (curvature + lambda I)^-1 gradient of each query's quantity, at one checkpoint.

    Attributes:
        modules: Names of the layers whose parameters are used, in the model's order.
        precision: Of weights, samples and vectors in the computation, and of what is stored; tf32
            is float32 with products in TF32 on a GPU.
    """

    kind: Literal["s-test"] = "s-test"
    checkpoint: Checkpoint
    modules: Annotated[tuple[str, ...], Field(min_length=1)]
    queries: Queries
    curvature: Curvature = Curvature()
    solver: AnySolver = ConjugateGradientSettings()
    precision: FullPrecision = "float32"

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        if not self.solver.uses_curvature:  # it uses no matrix, so all matrices are the same
            object.__setattr__(self, "curvature", Curvature())
        if self.curvature.operator not in self.solver.operators:
            raise ValueError(
                f"{self.solver.name} inverts the {self.solver.operators[0]} matrix only: "
                "leave --operator out"
            )
        if self.precision == "tf32" and self.curvature.product == "finite-difference":
            raise ValueError(
                "a finite difference is smaller than TF32's rounding: use --product exact, or "
                "--precision float32"
            )
        if isinstance(self.solver, SourceSettings):
            require_segments(self.checkpoint, self.solver.segments)
        return self


def stored_epochs(checkpoint: TrainedCheckpoint) -> list[int]:
    """The epochs up to a checkpoint whose weights its run keeps."""
    return [epoch for epoch in checkpoint.train.save_epochs if epoch <= checkpoint.epoch]


def spread_epochs(last: int, segments: int) -> tuple[int, ...]:
    """Epochs to keep for a number of segments: two in each, evenly, as far as there are so many."""
    wanted = 2 * segments
    return tuple(sorted({-(-last * i // wanted) for i in range(1, wanted + 1)}))


def require_segments(checkpoint: Checkpoint, segments: int) -> None:
    """Refuse a checkpoint whose training cannot be cut into segments.

    Raises:
        ValueError: Naming the cure.
    """
    if not isinstance(checkpoint, TrainedCheckpoint):
        raise ValueError(  # noqa: TRY004  (pydantic's)
            "--solver source goes through the steps of a training, and it is not known how "
            f"{checkpoint.words()} was trained: name a train run with --checkpoint, or use another "
            "--solver"
        )
    train = checkpoint.train
    if not train.follows_gradient:
        clipped = "" if train.clip_norm is None else ", with a clipped norm"
        raise ValueError(
            f"--solver source needs a training by plain SGD, and {train.run_id} has "
            f"{train.how()}{clipped}: use another --solver"
        )
    stored, last = stored_epochs(checkpoint), checkpoint.epoch
    if len(stored) >= segments:
        return
    if last < segments:
        raise ValueError(
            f"{segments} segments need as many epochs, and {checkpoint.words()} is earlier: use "
            f"--segments {last}, or train longer"
        )
    missing = (f"--save-epoch {e}" for e in spread_epochs(last, segments) if e not in stored)
    raise ValueError(
        f"{segments} segments need the weights of as many epochs up to {last}, and {train.run_id} "
        f"keeps {', '.join(map(str, stored))}: train with {' '.join(missing)}"
    )
