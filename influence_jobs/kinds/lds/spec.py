"""The linear datamodeling score."""

from typing import Annotated, Literal

from pydantic import Field

from influence_jobs.specs.rankings import SubsetsSpec


class LdsSpec(SubsetsSpec):
    """Linear datamodeling score: do sums of scores predict the losses of retrained models?

    Park et al. 2023, "TRAK: Attributing Model Behavior at Scale".

    Attributes:
        subsets: Number of random subsets that models are retrained on.
    """

    kind: Literal["lds"] = "lds"
    subsets: Annotated[int, Field(ge=3)] = 100
