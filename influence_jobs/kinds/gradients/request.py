"""The request for projected gradients."""

import re
from typing import Any

from influence_jobs.errors import SpecError
from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.kinds.s_test.request import LAYERS_THAT_COUNT
from influence_jobs.requests.base import Many, Say, option
from influence_jobs.requests.options import SeedOptions, WeightsRequest
from influence_jobs.specs.base import Count, Spec, make_spec
from influence_jobs.terms import Distribution, JobPrecision, Stored


class GradientsRequest(WeightsRequest, SeedOptions):
    """Random projections of every training sample's gradient, stored for later queries.

    Each checkpoint has a run of its own.
    """

    layer: Many[str | int] = option((), LAYERS_THAT_COUNT)
    dim: str = option(
        "16x16",
        "How many numbers are kept of a layer's gradient: outputs x inputs. A layer with no more"
        " parameters than that is kept as it is.",
        metavar="OUTxIN",
    )
    projection: Distribution = option(
        "gaussian", "Distribution of the entries of the random matrices."
    )
    whole: bool = option(False, "Project all layers together, not each by itself.")
    stored: Stored = option(
        "float16", "How the numbers are rounded; --dry-run tells what that loses."
    )
    precision: JobPrecision = option(
        "float32",
        "Precision of the computation. tf32: float32, with products in TF32 on a GPU; bfloat16: "
        "torch's autocast; bfloat16-weights: with the weights in bfloat16 too, in half the "
        "memory. A model that is built in float64 is computed in it.",
    )
    noise_draws: Count = option(
        1, "Number of noise draws of a training sample to average over, for tasks with noise."
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.requests.subject import subject_of

        subject = subject_of(self, root, say)
        return gradients_of(self, subject, say)


def gradients_of(request: GradientsRequest, subject: Any, say: Say) -> tuple[GradientsSpec, ...]:
    """Specs of the training samples' gradients, one for each checkpoint of the subject."""
    import torch

    from influence_jobs.tasks.layers import resolve_layers, trained_modules
    from influence_jobs.tasks.placement import dtype_of

    built = subject.built
    modules = (
        resolve_layers(request.layer, built, say)
        if request.layer
        else trained_modules(built.model())
    )
    found = re.fullmatch(r"(\d+)x(\d+)", request.dim)
    if not found or "0" in found.groups():
        raise SpecError(f"--dim {request.dim}: write two numbers, such as 16x16")
    precision = request.precision
    if not request.given("precision") and dtype_of(built.model()) == torch.float64:
        precision = "float64"
    return tuple(
        make_spec(
            GradientsSpec,
            task=subject.task,
            checkpoint=checkpoint,
            modules=modules,
            outputs=int(found[1]),
            inputs=int(found[2]),
            distribution=request.projection,
            whole=request.whole,
            keeps_small=True,
            stored=request.stored,
            precision=precision,
            noise_draws=request.noise_draws,
            seed=request.seed,
        )
        for checkpoint in subject.checkpoints
    )
