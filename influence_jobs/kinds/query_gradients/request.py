"""The request for projected gradients of queries."""

from influence_jobs.errors import SpecError
from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.kinds.query_gradients.spec import QueryGradientsSpec
from influence_jobs.requests.base import Say, option
from influence_jobs.requests.options import QueriesOptions, WeightsRequest
from influence_jobs.specs.base import Spec, make_spec


class QueryGradientsRequest(WeightsRequest, QueriesOptions):
    """Projected gradients of queries; gradient-scores makes them when it needs them."""

    gradients: str = option(
        ..., "Run of `infl submit gradients`, whose projection is used.", metavar="RUN"
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.requests.queries import queries_of
        from influence_jobs.requests.subject import subject_of

        store = store_named(root, self.gradients)
        refuse_another_checkpoint(self)
        at = (store.checkpoint,)
        subject = subject_of(self, root, say, default_checkpoints=at, default_task=store.task)
        queries = queries_of(self, subject.built)
        spec = make_spec(QueryGradientsSpec, task=subject.task, gradients=store, queries=queries)
        return (spec,)


def store_named(root: str, word: str) -> GradientsSpec:
    """The spec of a store of training samples' gradients.

    Raises:
        SpecError: The run is of another kind.
    """
    from influence_jobs.store.find import find_run

    spec = find_run(root, word).spec
    if not isinstance(spec, GradientsSpec):
        raise SpecError(f"{spec.run_id} has no projected gradients: name a gradients run")
    return spec


def refuse_another_checkpoint(request: WeightsRequest) -> None:
    """Refuse options that say which weights, beside a store.

    Raises:
        SpecError: There is one.
    """
    if any(request.given(name) for name in ("checkpoint", "preset", "epochs")):
        raise SpecError(
            "--gradients RUN decides the checkpoint: leave --checkpoint, --preset and --epochs out"
        )
