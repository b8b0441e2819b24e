"""The request for baselines."""

from typing import Literal

from influence_jobs.errors import SpecError
from influence_jobs.kinds.baseline.spec import METHODS, BaselineSpec
from influence_jobs.requests.base import Say, option
from influence_jobs.requests.options import (
    SCORES,
    CurvatureOptions,
    QueriesOptions,
    WeightsRequest,
)
from influence_jobs.specs.base import Spec, make_spec

_METHODS = "; ".join(f"{name}: {method.quantity}" for name, method in METHODS.items())


class BaselineRequest(WeightsRequest, QueriesOptions):
    """Baselines: simple scores that a method must beat, in the same form as its scores."""

    method: Literal[(*METHODS, "dot-product")] = option(  # type: ignore[valid-type]
        ...,
        f"{_METHODS}; dot-product: dot product of the two gradients (influence without curvature).",
        panel=SCORES,
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.jobs.queries import require_comparable
        from influence_jobs.requests.queries import queries_of
        from influence_jobs.requests.rankings import influence_of
        from influence_jobs.requests.subject import subject_of

        subject = subject_of(self, root, say)
        queries = queries_of(self, subject.built)
        if self.method == "dot-product":
            identity = CurvatureOptions(solver="identity")
            return (influence_of(subject, queries, identity, say, seed=self.seed),)
        if self.given("quantity"):
            raise SpecError("--quantity is what influence explains: leave it out")
        if self.method == "nearest":
            require_comparable(subject.built, queries)
        spec = make_spec(
            BaselineSpec,
            task=subject.task,
            method=self.method,
            queries=queries,
            checkpoint=subject.checkpoints[0],
            seed=self.seed,
        )
        return (spec,)
