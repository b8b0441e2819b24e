"""The view of exact influence through a training."""

from influence_jobs.kinds.unrolled.spec import UnrolledSpec
from influence_jobs.views.scores import ScoresView, influence_sides


class UnrolledView(ScoresView[UnrolledSpec]):
    """The samples that helped and harmed each query most in this very run."""

    @property
    def method(self) -> str:
        return "unrolled influence"

    @property
    def sides(self) -> dict[str, bool]:
        return influence_sides(self.spec.queries.quantity)

    def certainty(self) -> list[str]:
        seed = self.spec.checkpoint.train.seed
        exact = (
            f"Exact derivatives of the training of seed {seed} as it was, with its order and its "
            "dropout masks. Other seeds give other scores: infl submit influence asks what is "
            "common to them."
        )
        reach = (
            "A derivative tells of small changes: infl submit lds --same-run measures how far it "
            "reaches."
        )
        return [exact, reach]
