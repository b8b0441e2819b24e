"""Per-sample gradient norms, replayed at checkpoints."""

import json
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.specs.base import Count
from influence_jobs.specs.norms import NormsSpec
from influence_jobs.terms import JobPrecision, Reduction


class GradNormsSpec(NormsSpec):
    """Replay: per-sample gradient norms of layers at checkpoints, with the model in eval mode.

    Attributes:
        layers: Layer names, in forward order.
        combine: Norms of several checkpoints are summed, or kept on a leading axis.
        seed: Seed of the samples' noise, if the task has noise.
        tokens: Also keep the norms of each token, of up to so many in a sample; None for not.
    """

    kind: Literal["grad-norms"] = "grad-norms"
    checkpoints: Annotated[tuple[Checkpoint, ...], Field(min_length=1)]
    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    reduction: Reduction = "channel"
    combine: Literal["sum", "keep"] = "sum"
    precision: JobPrecision = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    tokens: Count | None = None

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        if self.combine == "sum":  # a sum has no order
            ordered = sorted(self.checkpoints, key=lambda c: json.dumps(c.identity()))
            object.__setattr__(self, "checkpoints", tuple(ordered))
        return self

    @property
    def layers_with_norms(self) -> tuple[str, ...]:
        return self.layers

    @property
    def norms_reduction(self) -> Reduction:
        return self.reduction
