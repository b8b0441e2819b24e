"""The request for an index of projected gradients."""

from typing import Annotated

from pydantic import Field

from influence_jobs.errors import SpecError
from influence_jobs.kinds.gradient_index.spec import DAMPING, GradientIndexSpec
from influence_jobs.kinds.query_gradients.request import store_named
from influence_jobs.requests.base import One, Request, Say, option
from influence_jobs.specs.base import Spec, make_spec
from influence_jobs.terms import GradientMethod


class GradientIndexRequest(Request):
    """An index for approximate top samples; gradient-scores --approximate makes it if needed."""

    gradients: str = option(..., "Run with the gradients.", metavar="RUN")
    method: GradientMethod = option("influence", "The scores that it is for.")
    damping: One[Annotated[float, Field(ge=0)] | None] = option(
        None, "Lambda, as a part of the mean eigenvalue of a layer's G; 0.1 by default."
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        store = store_named(root, self.gradients)
        if self.given("damping") and self.method not in DAMPING:
            raise SpecError(f"--damping has no meaning for --method {self.method}: leave it out")
        damping = DAMPING.get(self.method, 0.0) if self.damping is None else self.damping
        spec = make_spec(
            GradientIndexSpec,
            task=store.task,
            gradients=store,
            method=self.method,
            damping=damping,
        )
        return (spec,)
