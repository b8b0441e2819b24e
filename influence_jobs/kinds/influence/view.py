"""The view of influence scores."""

from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.s_test.view import STestView
from influence_jobs.store.run import Run
from influence_jobs.views.scores import ScoresView, influence_sides


class InfluenceView(ScoresView[InfluenceSpec]):
    """The most helpful and the most harmful samples of each query."""

    @property
    def method(self) -> str:
        spec = self.spec
        solvers = ", ".join(dict.fromkeys(s_test.solver.name for s_test in spec.s_tests))
        over = f", {spec.combine} of {len(spec.s_tests)}" if len(spec.s_tests) > 1 else ""
        divided = f", {spec.relative}-relative" if spec.relative else ""
        return f"influence ({solvers}{over}{divided})"

    @property
    def sides(self) -> dict[str, bool]:
        return influence_sides(self.spec.queries.quantity)

    def certainty(self) -> list[str]:
        views = [STestView(Run(self.run.root, s_test)) for s_test in self.spec.s_tests]
        return list(dict.fromkeys(line for view in views for line in view.certainty()))
