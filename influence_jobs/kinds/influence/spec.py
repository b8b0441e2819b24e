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
        s_tests: s_test runs of the same queries, at one or several checkpoints or trainings.
        combine: Scores of several s_test runs are summed (TracIn, over checkpoints) or averaged
            (ensemble, over seeds).
        relative: Divide by the size of the sample's own effect on the parameters (theta-relative)
            or on the training losses (loss-relative), by the EK-FAC or identity approximation
            (Barshan et al. 2020).
        keep_modules: Also keep the scores of each layer.
        noise_draws: Scores are the mean over this many draws of the training samples' noise.
        seed: Seed of the noise.
        tokens: Also keep the scores of each token, of up to so many in a sample; None for not.
        sample_precision: In which training samples go forward and backward; None for that of the
            s_test vectors.
    """

    kind: Literal["influence"] = "influence"
    s_tests: Annotated[tuple[STestSpec, ...], Field(min_length=1)]
    combine: Literal["sum", "mean"] = "sum"
    relative: Literal["theta", "loss"] | None = None
    keep_modules: bool = False
    noise_draws: Count = 1
    seed: Seed = 0
    tokens: Count | None = None
    sample_precision: Literal["bfloat16"] | None = None

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        # The order changes neither a sum nor a mean.
        ordered = sorted(self.s_tests, key=lambda s_test: s_test.run_id)
        object.__setattr__(self, "s_tests", tuple(ordered))
        first = ordered[0]
        for before, other in itertools.pairwise(ordered):
            if other.run_id == before.run_id:
                raise ValueError(f"{other.run_id} is named twice")
            if (other.queries, other.modules) != (first.queries, first.modules):
                raise ValueError(
                    f"{other.run_id} has other queries or layers than {first.run_id}: name s-test "
                    "runs of the same queries and layers"
                )
            if other.task.identity() != first.task.identity():
                raise ValueError(f"{other.run_id} is of another task or data than {first.run_id}")
            if other.precision != first.precision:
                raise ValueError(f"{other.run_id} is of another precision than {first.run_id}")
        if self.sample_precision is not None and self.tokens is not None:
            raise ValueError(
                f"--per-token compares each score with the sum of its parts, which "
                f"--precision {self.sample_precision} is too coarse for: leave one of them out"
            )
        if self.sample_precision is not None and first.precision != "float32":
            raise ValueError(
                f"--precision {self.sample_precision} goes with s_test vectors of float32, and "
                f"those of {first.run_id} are of {first.precision}: leave it out"
            )
        if self.relative is not None and not all(s_test.solver.inverts for s_test in ordered):
            raise ValueError(
                f"--solver {first.solver.name} does not give the size of a sample's own effect: "
                "leave --relative out"
            )
        if len(self.s_tests) == 1:
            object.__setattr__(self, "combine", "sum")
        return self

    @property
    def queries(self) -> Queries:
        return self.s_tests[0].queries
