"""Requests for scores: what a query is, how curvature is inverted, and which method scores the training samples."""

import itertools
from abc import abstractmethod
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.specs.base import Model, Spec
from influence_jobs.specs.training import Checkpoint, GradNormsSpec, TrainSpec
from influence_jobs.terms import Reduction, Region

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class Query(Model):
    """One output to explain: a test sample, or a region (y, x, height, width) of a test image."""

    test: Annotated[int, Field(ge=0)]
    region: Region | None = None

    @model_validator(mode="after")
    def _region_is_not_empty(self) -> Self:
        if self.region is not None and (min(self.region[:2]) < 0 or min(self.region[2:]) < 1):
            raise ValueError(
                f"region {','.join(map(str, self.region))} is empty or outside the image: "
                "y,x,height,width from 0,0 and at least 1 x 1"
            )
        return self


class Queries(Model):
    """What is explained.

    Attributes:
        items: The queries; the position of one is its row in the results.
        quantity: What is measured of the output (`Task.quantities`).
        noise_draws: Draws of the test samples' noise, averaged, where a task has noise.
        seed: Seed of that noise.
    """

    items: Annotated[tuple[Query, ...], Field(min_length=1)]
    quantity: str = "loss"
    noise_draws: Count = 1
    seed: Seed = 0

    @model_validator(mode="after")
    def _no_query_twice(self) -> Self:
        seen: set[Query] = set()
        for query in self.items:
            if query in seen:
                raise ValueError(f"test {query.test} is asked for twice")
            seen.add(query)
        return self


class Curvature(Model):
    """The matrix to invert: that of the mean training loss.

    Attributes:
        operator: Gauss-Newton is positive semidefinite; the Hessian of a network is not.
        product: The Hessian's, exact (Pearlmutter) or by finite differences.
        samples: Size of the random subset of training samples it is measured on; None for all.
        seed: Of the subset, of mini-batches and of the samples' noise.
    """

    operator: Literal["gauss-newton", "hessian"] = "gauss-newton"
    product: Literal["exact", "finite-difference"] = "exact"
    samples: Count | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def _gauss_newton_is_exact(self) -> Self:
        if self.operator == "gauss-newton" and self.product != "exact":
            raise ValueError("finite differences are of the Hessian: use --operator hessian")
        return self


class ConjugateGradient(Model):
    """Batched conjugate gradients to a relative residual. `damping` is lambda; None chooses it."""

    name: Literal["cg"] = "cg"
    damping: Positive | None = None
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    max_iterations: Count = 200


class Lissa(Model):
    """Stochastic recursion; see `curvature.lissa`. None leaves a choice to the measured spectrum.

    Attributes:
        damping: Effective damping lambda: the recursion's own is damping / scale.
        batch_size: Samples of a step.
        repeats: Independent chains, averaged.
    """

    name: Literal["lissa"] = "lissa"
    damping: Positive | None = None
    scale: Positive | None = None
    depth: Count | None = None
    batch_size: Count | None = None
    repeats: Count = 5


class EkFac(Model):
    """Eigenvalue-corrected Kronecker factors (George et al. 2018) of Linear and Conv2d layers."""

    name: Literal["ek-fac"] = "ek-fac"
    damping: Positive | None = None


class Identity(Model):
    """No curvature: s_test is the query's gradient itself."""

    name: Literal["identity"] = "identity"


Solver = ConjugateGradient | Lissa | EkFac | Identity


class STestSpec(Spec):
    """s_test = (curvature + lambda I)^-1 gradient of each query's quantity, at one checkpoint.

    Attributes:
        modules: Names of the modules whose parameters count, in the model's order.
    """

    kind: Literal["s-test"] = "s-test"
    checkpoint: Checkpoint
    modules: Annotated[tuple[str, ...], Field(min_length=1)]
    queries: Queries
    curvature: Curvature = Curvature()
    solver: Annotated[Solver, Field(discriminator="name")] = ConjugateGradient()

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        if isinstance(self.solver, Identity):  # which matrix is not used does not matter
            object.__setattr__(self, "curvature", Curvature())
        if isinstance(self.solver, EkFac) and self.curvature.operator != "gauss-newton":
            raise ValueError("EK-FAC approximates the Gauss-Newton matrix: leave --operator out")
        return self


class ScoresSpec(Spec):
    """Base of the requests that give a score to every (query, training sample)."""

    @property
    @abstractmethod
    def asked(self) -> Queries:
        """The queries of the rows."""


class InfluenceSpec(ScoresSpec):
    """s_test . gradient of each training sample's loss: positive = helpful.

    Attributes:
        s_tests: One; or several checkpoints of a training or several trainings, of the same queries.
        combine: Over several s_tests, the sum (TracIn, over checkpoints) or mean (ensemble, over seeds).
        relative: Divide by the size of the sample's own effect on the parameters (theta-relative) or on the training
            losses (loss-relative; Barshan et al. 2020), both by the EK-FAC or identity approximation.
        keep_modules: Keep each module's part of the scores too.
        noise_draws: Draws of the training samples' noise, averaged, where a task has noise.
    """

    kind: Literal["influence"] = "influence"
    s_tests: Annotated[tuple[STestSpec, ...], Field(min_length=1)]
    combine: Literal["sum", "mean"] = "sum"
    relative: Literal["theta", "loss"] | None = None
    keep_modules: bool = False
    noise_draws: Count = 1
    seed: Seed = 0

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        # Neither a sum nor a mean has an order.
        ordered = sorted(self.s_tests, key=lambda s_test: s_test.run_id)
        object.__setattr__(self, "s_tests", tuple(ordered))
        first = ordered[0]
        for before, other in itertools.pairwise(ordered):
            if other.run_id == before.run_id:
                raise ValueError(f"{other.run_id} is named twice")
            if (other.queries, other.modules) != (first.queries, first.modules):
                raise ValueError(f"{other.run_id} has other queries or layers than {first.run_id}")
            if other.task.identity() != first.task.identity():
                raise ValueError(f"{other.run_id} is of another task or data than {first.run_id}")
        if len(self.s_tests) == 1:
            object.__setattr__(self, "combine", "sum")
        return self

    @property
    def asked(self) -> Queries:
        return self.s_tests[0].queries


class AttributionSpec(ScoresSpec):
    """The report's first method: the query's activations times the samples' gradient norms.

    Attributes:
        norms: Run that has the norms: replayed, or recorded while training.
        checkpoint: Weights of the activations.
        layers: Module names, all in `norms`; scores are summed over them.
        exclude_norm_above: Leave out samples whose total norm is larger.
        normalize: Divide a sample's norms by their sum.
        keep_layers: Keep each layer's scores too.
    """

    kind: Literal["attribution"] = "attribution"
    norms: Annotated[GradNormsSpec | TrainSpec, Field(discriminator="kind")]
    checkpoint: Checkpoint
    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    queries: Queries
    exclude_norm_above: Positive | None = None
    normalize: bool = False
    keep_layers: bool = False

    @model_validator(mode="after")
    def _layers_have_norms(self) -> Self:
        recorded = (
            self.norms.layers if isinstance(self.norms, GradNormsSpec) else self.norms.norm_layers
        )
        for layer in self.layers:
            if layer not in recorded:
                has = ", ".join(recorded) or "no norms"
                raise ValueError(f"{self.norms.run_id} has no norms of layer {layer}; it has {has}")
        if self.reduction == "layer":
            raise ValueError(
                f"{self.norms.run_id} has one norm a layer, and attribution needs one a channel: record them "
                "with --reduce channel or kernel"
            )
        if self.norms.task.data != self.task.data:
            raise ValueError(f"{self.norms.run_id} has the norms of other data")
        return self

    @property
    def asked(self) -> Queries:
        return self.queries

    @property
    def reduction(self) -> Reduction:
        """What the norms are kept as."""
        norms = self.norms
        return norms.reduction if isinstance(norms, GradNormsSpec) else norms.norm_reduction


class BaselineSpec(ScoresSpec):
    """Scores that know less, to compare with.

    Attributes:
        method: Random numbers; the sample's own training loss; minus the distance of the pixels.
        checkpoint: Weights the loss is taken at; None for other methods.
        seed: Of the random numbers, and of the samples' noise.
    """

    kind: Literal["baseline"] = "baseline"
    method: Literal["random", "loss", "nearest"]
    queries: Queries
    checkpoint: Checkpoint | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        if self.method == "loss" and self.checkpoint is None:
            raise ValueError("the loss is taken at a checkpoint: name one")
        if self.method != "loss":
            object.__setattr__(self, "checkpoint", None)
        return self

    @property
    def asked(self) -> Queries:
        return self.queries
