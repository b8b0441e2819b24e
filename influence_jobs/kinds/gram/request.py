"""The request for second moments of projected gradients."""

from typing import Literal

from influence_jobs.kinds.gram.spec import GramSpec
from influence_jobs.kinds.query_gradients.request import store_named
from influence_jobs.requests.base import Request, Say, option
from influence_jobs.specs.base import Spec, make_spec


class GramRequest(Request):
    """Second moments of stored gradients; gradient-scores makes them when it needs them."""

    gradients: str = option(..., "Run with the gradients.", metavar="RUN")
    quantity: Literal["loss", "margin"] = option(
        "loss", "Gradients of the loss, or of the margin log(p / (1 - p)), as TRAK has them."
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        store = store_named(root, self.gradients)
        return (make_spec(GramSpec, task=store.task, gradients=store, quantity=self.quantity),)
