"""The request for s_test vectors."""

from influence_jobs.requests.base import Many, Say, option
from influence_jobs.requests.options import CurvatureOptions, QueriesOptions, WeightsRequest
from influence_jobs.specs.base import Spec

LAYERS_THAT_COUNT = (
    "Layer whose parameters are used: number (from 1, in forward order), module or parameter name, "
    "pattern such as '*lora*', or all: all that have a number. May be repeated; by default every "
    "trained parameter."
)


class STestRequest(WeightsRequest, QueriesOptions, CurvatureOptions):
    """The s_test vectors: gradients of chosen outputs times the inverse curvature of the loss.

    Each checkpoint has a run of its own.
    """

    layer: Many[str | int] = option((), LAYERS_THAT_COUNT)

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.requests.queries import queries_of
        from influence_jobs.requests.solving import s_tests_of
        from influence_jobs.requests.subject import subject_of

        subject = subject_of(self, root, say)
        queries = queries_of(self, subject.built)
        return s_tests_of(self, subject, queries, say, layers=self.layer, seed=self.seed)
