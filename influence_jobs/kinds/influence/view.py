"""The view of influence scores."""

from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.s_test.view import STestView
from influence_jobs.store.run import Run
from influence_jobs.views.scores import ScoresView


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
        if self.spec.queries.quantity == "loss":
            return {"helpful": True, "harmful": False}
        return {"lowers it": True, "raises it": False}

    def certainty(self) -> list[str]:
        views = [STestView(Run(self.run.root, s_test)) for s_test in self.spec.s_tests]
        return list(dict.fromkeys(line for view in views for line in view.certainty()))
