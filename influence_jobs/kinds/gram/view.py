"""The view of second moments."""

from influence_jobs.kinds.gram.spec import GramSpec
from influence_jobs.views.base import View


class GramView(View[GramSpec]):
    """Second moments of stored gradients, which scores divide by."""

    @property
    def title(self) -> str:
        return f"Second moments of projected gradients ({self.spec.task.slug})"

    def certainty(self) -> list[str]:
        return ["Summed in float64 over blocks of rows."]

    def next_step(self) -> str:
        store = self.spec.gradients.run_id
        return f"infl submit gradient-scores --gradients {store} --test 0{self.more}"
