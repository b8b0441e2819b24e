"""Exact influence through the training of one run."""

from typing import Literal, Self

from pydantic import model_validator

from influence_jobs.kinds.train.spec import TrainedCheckpoint
from influence_jobs.specs.queries import Queries
from influence_jobs.specs.scores import ScoresSpec
from influence_jobs.terms import ScorePrecision


class UnrolledSpec(ScoresSpec):
    """The derivative of a query by the weight of each sample's loss in one training.

    Attributes:
        checkpoint: The end of the training, or an epoch before it: what comes later does not count.
        precision: Of the derivatives, of the model where they go back through it, and of what is
            stored. The steps of the training are as they were.
    """

    kind: Literal["unrolled"] = "unrolled"
    checkpoint: TrainedCheckpoint
    queries: Queries
    precision: ScorePrecision = "float32"

    @model_validator(mode="after")
    def _steps_are_known(self) -> Self:
        train = self.checkpoint.train
        if train.trainer == "task":
            raise ValueError(
                f"task {train.task.name} trains itself, by train(), so the steps of its training "
                "are not known: give it an optimizer() in place of train(), or use infl submit "
                "influence"
            )
        if train.trainer == "recorded":
            raise ValueError(
                f"{train.run_id} was recorded elsewhere, so the steps of its training cannot be "
                "repeated: train it by infl submit train, or use infl submit influence"
            )
        return self
