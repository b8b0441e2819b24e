"""The linear datamodeling score."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.specs.rankings import SubsetsSpec


class LdsSpec(SubsetsSpec):
    """Linear datamodeling score: do sums of scores predict the losses of retrained models?

    Park et al. 2023, "TRAK: Attributing Model Behavior at Scale".

    Attributes:
        subsets: Number of random subsets that models are retrained on.
        same_run: Every subset is trained from `seeds` itself, the one seed, with the order of the
            samples and all other random numbers as they were, and with the samples outside of it
            masked (`training.changes.Changes`). Else each subset has seeds of its own, and the
            samples outside of it are removed.
    """

    kind: Literal["lds"] = "lds"
    subsets: Annotated[int, Field(ge=3)] = 100
    same_run: bool = False

    @property
    def unsaid(self) -> frozenset[str]:
        return frozenset() if self.same_run else frozenset({"same_run"})

    @model_validator(mode="after")
    def _the_same_run_has_one_seed(self) -> Self:
        if self.same_run and len(self.seeds) > 1:
            raise ValueError("the same run has one seed: leave --seeds out with --same-run")
        return self
