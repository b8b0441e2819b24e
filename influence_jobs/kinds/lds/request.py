"""The request for a linear datamodeling score."""

from typing import Annotated

from pydantic import Field

from influence_jobs.errors import SpecError
from influence_jobs.kinds.lds.spec import LdsSpec
from influence_jobs.requests.base import One, Say, option
from influence_jobs.requests.experiments import (
    EnsembleOptions,
    ExperimentRequest,
    SeedsOptions,
    require_same_run,
)
from influence_jobs.requests.options import EXPERIMENT
from influence_jobs.specs.base import Spec, make_spec

METHODS = ("helpful", "dot-product", "attribution", "nearest", "loss", "random")


class LdsRequest(ExperimentRequest, SeedsOptions, EnsembleOptions):
    """Linear datamodeling score: do sums of scores predict the losses of retrained models?

    Models are retrained on random subsets. They are kept, so methods added later use them too.
    """

    subsets: One[Annotated[int, Field(ge=3)]] = option(
        100, "Number of random subsets.", panel=EXPERIMENT
    )
    fraction: One[float] = option(
        0.5, "Share of the training set in each subset.", panel=EXPERIMENT
    )
    same_run: bool = option(
        False,
        "Repeat the training itself for each subset, from its seed and in its order and batches."
        " The samples outside of the subset are masked: their loss has weight 0. By default each"
        " subset is trained from other seeds without them.",
        panel=EXPERIMENT,
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.requests.solving import require_used

        if self.same_run and self.given("seeds"):
            raise SpecError("--same-run repeats the training from its own seed: leave --seeds out")
        trained, methods, rankings = self.rankings(root, say, METHODS)
        if self.same_run:
            require_same_run(trained)
        ranked = tuple(rankings.of(word, ensemble=self.ensemble) for word in methods)
        require_used(self, methods)
        spec = make_spec(
            LdsSpec,
            task=trained.subject.task,
            recipe=trained.train,
            rankings=ranked,
            seeds=(trained.train.seed,) if self.same_run else tuple(range(self.seeds)),
            subsets=self.subsets,
            fraction=self.fraction,
            own_starts=not self.same_run,
            same_run=self.same_run,
        )
        return (spec,)
