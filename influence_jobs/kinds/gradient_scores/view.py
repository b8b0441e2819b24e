"""The view of scores from stored projected gradients."""

from influence_jobs.kinds import view_of
from influence_jobs.kinds.gradient_index.spec import DAMPING
from influence_jobs.kinds.gradient_scores.spec import GradientScoresSpec
from influence_jobs.store.run import Run
from influence_jobs.views.scores import ScoresView


class GradientScoresView(ScoresView[GradientScoresSpec]):
    """The most helpful and the most harmful samples of each query."""

    @property
    def method(self) -> str:
        spec = self.spec
        over = f", {spec.combine} of {len(spec.gradients)}" if len(spec.gradients) > 1 else ""
        return f"{spec.method} of projected gradients{over}"

    @property
    def sides(self) -> dict[str, bool]:
        if self.spec.queries.quantity == "loss":
            return {"helpful": True, "harmful": False}
        return {"lowers it": True, "raises it": False}

    def certainty(self) -> list[str]:
        spec, store = self.spec, self.spec.gradients[0]
        line = (
            f"Gradients are projected to at most {store.outputs} x {store.inputs} numbers a layer "
            f"({store.distribution}, stored as {store.stored}), which adds random error"
        )
        if spec.method in DAMPING:
            line += f"; lambda = {spec.damping:g} x the mean eigenvalue of each layer's G"
        said = [f"{line}."]
        if spec.index is not None:
            said += view_of(Run(self.run.root, spec.index)).certainty()
        return said
