"""The request for gradient norms."""

from typing import ClassVar, Literal

from influence_jobs.errors import SpecError
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.requests.base import Many, Say, option
from influence_jobs.requests.options import LAYER, REDUCE, SeedOptions, WeightsRequest
from influence_jobs.specs.base import Spec, make_spec
from influence_jobs.terms import JobPrecision, Reduction


class GradNormsRequest(WeightsRequest, SeedOptions):
    """Per-sample gradient norms of chosen layers, at one or several checkpoints.

    `infl submit grad-norms --layer 11` alone works on a bare machine: it trains FFDNet for a few
    epochs on sample photographs and writes the norms of its eleventh convolution.
    """

    default_task: ClassVar[str] = "ffdnet"

    layer: Many[str | int] = option((), LAYER)
    reduce: Reduction = option("channel", REDUCE)
    combine: Literal["sum", "keep"] = option(
        "sum", "With several checkpoints: sum their norms, or keep them on a leading axis."
    )
    per_token: bool = option(
        False,
        "Also keep a norm for each token: of the gradient of its part of the sequence's loss, by"
        " each whole layer. It takes a pass for each token.",
    )
    precision: JobPrecision = option(
        "float32",
        "Precision of the computation. tf32: float32, with products in TF32 on a GPU; bfloat16: "
        "torch's autocast; bfloat16-weights: with the weights in bfloat16 too, in half the "
        "memory. A model that is built in float64 is computed in it.",
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        import torch

        from influence_jobs.requests.queries import tokens_kept
        from influence_jobs.requests.subject import subject_of
        from influence_jobs.tasks.layers import resolve_weights, say_slow_layers
        from influence_jobs.tasks.placement import dtype_of

        if not self.layer:
            raise SpecError("name at least one layer: --layer 11, --layer main.29, or --layer all")
        if self.per_token and self.precision == "bfloat16-weights":
            raise SpecError(
                "--per-token needs more precise losses than --precision bfloat16-weights gives: "
                "leave one of them out"
            )
        subject = subject_of(self, root, say)
        layers = resolve_weights(self.layer, subject.built, say)
        say_slow_layers(layers, subject.built, say)
        precision = self.precision
        if not self.given("precision") and dtype_of(subject.built.model()) == torch.float64:
            precision = "float64"
        spec = make_spec(
            GradNormsSpec,
            task=subject.task,
            checkpoints=subject.checkpoints,
            layers=layers,
            reduction=self.reduce,
            combine=self.combine,
            precision=precision,
            seed=self.seed,
            tokens=tokens_kept(subject.task, self.seed, say) if self.per_token else None,
        )
        return (spec,)
