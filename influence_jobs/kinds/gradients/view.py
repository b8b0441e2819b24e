"""The view of stored projected gradients."""

from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.views.base import View


class GradientsView(View[GradientsSpec]):
    """What is stored; scores are made of it by `infl submit gradient-scores`."""

    @property
    def title(self) -> str:
        return f"Projected gradients ({self.spec.task.slug})"

    def certainty(self) -> list[str]:
        spec = self.spec
        said = (
            f"{spec.distribution} projections, at most {spec.outputs} x {spec.inputs} numbers of "
            f"{'all layers' if spec.whole else 'each layer'}, stored as {spec.stored}; compared "
            "with plain autograd on samples from all over before the first batch."
        )
        return [said]

    def next_step(self) -> str:
        return f"infl submit gradient-scores --gradients {self.run.id} --test 0{self.more}"
