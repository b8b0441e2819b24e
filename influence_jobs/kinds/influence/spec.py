"""Influence scores."""

import itertools
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.specs.base import Count, Seed
from influence_jobs.specs.queries import Queries
from influence_jobs.specs.scores import ScoresSpec


class InfluenceSpec(ScoresSpec):
    """s_test . gradient of each training sample's loss: positive = helpful.

    Attributes:
        s_tests: One; or several checkpoints of a training or several trainings, of the same queries.
        combine: Over several s_tests, the sum (TracIn, over checkpoints) or mean (ensemble, over seeds).
        relative: Divide by the size of the sample's own effect on the parameters (theta-relative) or on the training
            losses (loss-relative; Barshan et al. 2020), both by the EK-FAC or identity approximation.
        keep_modules: Keep each module's part of the scores too.
        noise_draws: Draws of the training samples' noise, averaged, where a task has noise.
    """

    kind: Literal["influence"] = "influence"
    s_tests: Annotated[tuple[STestSpec, ...], Field(min_length=1)]
    combine: Literal["sum", "mean"] = "sum"
    relative: Literal["theta", "loss"] | None = None
    keep_modules: bool = False
    noise_draws: Count = 1
    seed: Seed = 0

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        # Neither a sum nor a mean has an order.
        ordered = sorted(self.s_tests, key=lambda s_test: s_test.run_id)
        object.__setattr__(self, "s_tests", tuple(ordered))
        first = ordered[0]
        for before, other in itertools.pairwise(ordered):
            if other.run_id == before.run_id:
                raise ValueError(f"{other.run_id} is named twice")
            if (other.queries, other.modules) != (first.queries, first.modules):
                raise ValueError(f"{other.run_id} has other queries or layers than {first.run_id}")
            if other.task.identity() != first.task.identity():
                raise ValueError(f"{other.run_id} is of another task or data than {first.run_id}")
        if len(self.s_tests) == 1:
            object.__setattr__(self, "combine", "sum")
        return self

    @property
    def asked(self) -> Queries:
        return self.s_tests[0].queries
