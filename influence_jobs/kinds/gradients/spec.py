"""Projected gradients."""

from typing import Annotated, Literal

from pydantic import Field

from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.specs.base import Count, Seed, Spec
from influence_jobs.terms import Distribution, JobPrecision, Stored


class GradientsSpec(Spec):
    """A random projection of the gradient of every training sample's loss.

    Attributes:
        modules: Names of the layers whose parameters are used, in the model's order.
        outputs, inputs: A layer's projection is a matrix of at most outputs x inputs numbers; see
            `gradients.projections`.
        distribution: Of the entries of the random matrices.
        whole: One projection of all layers, in place of one each.
        keeps_small: A layer with no more numbers than that is kept as it is.
        stored: How the numbers are rounded; see `methods.packing`.
        precision: Of the forward and backward pass.
        noise_draws: Gradients are the mean over this many draws of the training samples' noise.
        seed: Of the projection, and of the samples' noise.
    """

    kind: Literal["gradients"] = "gradients"
    checkpoint: Checkpoint
    modules: Annotated[tuple[str, ...], Field(min_length=1)]
    outputs: Count = 16
    inputs: Count = 16
    distribution: Distribution = "gaussian"
    whole: bool = False
    keeps_small: bool = False
    stored: Stored = "float16"
    precision: JobPrecision = "float32"
    noise_draws: Count = 1
    seed: Seed = 0
