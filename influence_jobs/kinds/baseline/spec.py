"""Baselines: simple scores to compare with."""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import model_validator

from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.specs.base import Seed
from influence_jobs.specs.queries import Queries
from influence_jobs.specs.scores import ScoresSpec
from influence_jobs.terms import FullPrecision


@dataclass(frozen=True)
class Baseline:
    """The meaning of one method's scores.

    Attributes:
        quantity, sign, unit: As in the attributes of the array.
        of_weights: Whether the scores depend on the model's weights.
    """

    quantity: str
    sign: str
    unit: str
    of_weights: bool = False


# Each is scored by the function of that name in `BaselineJob`: `_random`, ...
METHODS = {
    "random": Baseline("a uniform random number", "none", "none"),
    "loss": Baseline("the sample's own training loss", "positive = fits badly", "loss", True),
    "norm": Baseline(
        "the norm of the sample's own loss gradient by the layers' weights",
        "positive = large",
        "gradient norm",
        True,
    ),
    "nearest": Baseline(
        "minus the Euclidean distance of the pixels", "larger = more alike", "grey levels"
    ),
}
# Nearest, for a task with vectors of its own.
EMBEDDED = Baseline("minus the Euclidean distance of embed()", "larger = more alike", "none")


class BaselineSpec(ScoresSpec):
    """Simple scores to compare a method with.

    Attributes:
        method: One of `METHODS`.
        queries: The queries, one a row of the scores.
        checkpoint: The weights that the scores are taken at; None if they depend on none.
        seed: Seed of the random numbers and of the samples' noise.
        precision: Of the computation; None: what the model is built in, but no half precision.
    """

    kind: Literal["baseline"] = "baseline"
    method: str
    queries: Queries
    checkpoint: Checkpoint | None = None
    seed: Seed = 0
    precision: FullPrecision | None = None

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        if self.method not in METHODS:
            raise ValueError(
                f"there is no baseline {self.method!r}; there are {', '.join(METHODS)}"
            )
        if not METHODS[self.method].of_weights:
            object.__setattr__(self, "checkpoint", None)
            object.__setattr__(self, "precision", None)
        elif self.checkpoint is None:
            raise ValueError(f"the {self.method} is taken at a checkpoint: name one")
        return self
