"""The view of projected gradients of queries."""

from influence_jobs.kinds.query_gradients.spec import QueryGradientsSpec
from influence_jobs.views.base import View


class QueryGradientsView(View[QueryGradientsSpec]):
    """Says what is stored."""

    @property
    def title(self) -> str:
        return f"Projected gradients of queries ({self.spec.task.slug})"

    def certainty(self) -> list[str]:
        return ["By plain autograd in float64, projected as the samples of the store."]

    def next_step(self) -> str:
        store = self.spec.gradients.run_id
        return f"infl submit gradient-scores --gradients {store} --test 0{self.more}"
