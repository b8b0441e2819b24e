"""The request for second moments of projected gradients."""

from typing import Literal

from influence_jobs.errors import SpecError
from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.kinds.gram.spec import GramSpec
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


def store_named(root: str, word: str) -> GradientsSpec:
    """The spec of a store of training samples' gradients.

    Raises:
        SpecError: The run is of another kind, or of queries.
    """
    from influence_jobs.store.find import find_run

    spec = find_run(root, word).spec
    if not isinstance(spec, GradientsSpec):
        raise SpecError(f"{spec.run_id} has no projected gradients: name a gradients run")
    if spec.queries is not None:
        raise SpecError(f"{spec.run_id} is of queries: name one of training samples")
    return spec
