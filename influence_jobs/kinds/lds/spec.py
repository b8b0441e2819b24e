"""The linear datamodeling score."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.specs.rankings import RetrainingSpec


class LdsSpec(RetrainingSpec):
    """Linear datamodeling score: do sums of scores predict the losses of retrained models?

    Park et al. 2023, "TRAK: Attributing Model Behavior at Scale".

    Attributes:
        subsets: Number of random subsets that models are retrained on.
        fraction: Fraction of the training set in each subset.
        same_run: Every subset is trained from `seeds` itself, the one seed, with the order of the
            samples and all other random numbers as they were, and with the samples outside of it
            masked (`training.changes.Changes`). Else each subset has seeds of its own, and the
            samples outside of it are removed.
    """

    kind: Literal["lds"] = "lds"
    subsets: Annotated[int, Field(ge=3)] = 100
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    same_run: bool = False

    @model_validator(mode="after")
    def _scores_are_taken_as_they_are(self) -> Self:
        if self.same_run and len(self.seeds) > 1:
            raise ValueError("the same run has one seed: leave --seeds out with --same-run")
        for ranking in self.rankings:
            if not ranking.largest:
                raise ValueError(
                    f"sums of scores have no smallest-first order: leave method {ranking.name} out"
                )
        return self
