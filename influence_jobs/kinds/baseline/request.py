"""The request for baselines."""

from typing import Literal

from influence_jobs.errors import SpecError
from influence_jobs.kinds.baseline.spec import METHODS, BaselineSpec
from influence_jobs.requests.base import Say, option
from influence_jobs.requests.options import (
    SCORES,
    QueriesOptions,
    WeightsRequest,
)
from influence_jobs.specs.base import Spec, make_spec
from influence_jobs.terms import JobPrecision

_METHODS = "; ".join(f"{name}: {method.quantity}" for name, method in METHODS.items())


class BaselineRequest(WeightsRequest, QueriesOptions):
    """Baselines: simple scores that a method must beat, in the same form as its scores."""

    method: Literal[(*METHODS, "dot-product", "cosine")] = option(  # type: ignore[valid-type]
        ...,
        f"{_METHODS}; dot-product: dot product of the two gradients (influence without curvature); "
        "cosine: the same divided by the norm of the sample's gradient.",
        panel=SCORES,
    )

    precision: JobPrecision | None = option(
        None,
        "Precision of the computation; by default float64 for a model that is built in it, else "
        "float32. tf32: float32 with products in TF32 on a GPU. bfloat16: dot-product and cosine "
        "alone.",
        panel=SCORES,
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.jobs.queries import require_comparable
        from influence_jobs.requests.queries import queries_of
        from influence_jobs.requests.rankings import GRADIENTS_ALONE, gradients_alone
        from influence_jobs.requests.solving import full_precision
        from influence_jobs.requests.subject import subject_of

        subject = subject_of(self, root, say)
        queries = queries_of(self, subject.built)
        if self.method in GRADIENTS_ALONE:
            found = gradients_alone(
                self.method, subject, queries, say, seed=self.seed, precision=self.precision
            )
            return (found,)
        if self.given("quantity"):
            raise SpecError(f"--quantity has no meaning for --method {self.method}: leave it out")
        if self.method == "nearest":
            require_comparable(subject.built, queries)
        asked = full_precision(self.precision, subject.built)
        spec = make_spec(
            BaselineSpec,
            task=subject.task,
            method=self.method,
            queries=queries,
            checkpoint=subject.checkpoints[0],
            seed=self.seed,
            # What the model is built in is the same run as without the option.
            precision=None if asked == full_precision(None, subject.built) else asked,
        )
        return (spec,)
