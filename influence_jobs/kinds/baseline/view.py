"""The view of baselines."""

from influence_jobs.kinds.baseline.spec import BaselineSpec
from influence_jobs.views.scores import ScoresView


class BaselineView(ScoresView[BaselineSpec]):
    """The top samples of a baseline."""

    @property
    def method(self) -> str:
        return self.spec.method

    def certainty(self) -> list[str]:
        return []
