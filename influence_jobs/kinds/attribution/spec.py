"""Attribution scores."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.specs.base import Positive
from influence_jobs.specs.norms import AnyNorms
from influence_jobs.specs.queries import Queries
from influence_jobs.specs.scores import ScoresSpec


class AttributionSpec(ScoresSpec):
    """The research report's first method: query activations times the samples' gradient norms.

    Attributes:
        norms: The run with the norms, replayed or recorded during training.
        checkpoint: The weights that the activations are taken at.
        layers: Layer names, all in `norms`; scores are summed over them.
        queries: The queries, one a row of the scores.
        exclude_norm_above: Leave out samples whose total norm is larger.
        normalize: Divide a sample's norms by their sum.
        keep_layers: Also keep the scores of each layer.
    """

    kind: Literal["attribution"] = "attribution"
    norms: AnyNorms
    checkpoint: Checkpoint
    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    queries: Queries
    exclude_norm_above: Positive | None = None
    normalize: bool = False
    keep_layers: bool = False

    @model_validator(mode="after")
    def _layers_have_norms(self) -> Self:
        recorded = self.norms.layers_with_norms
        for layer in self.layers:
            if layer not in recorded:
                has = ", ".join(recorded) or "no norms"
                raise ValueError(f"{self.norms.run_id} has no norms of layer {layer}; it has {has}")
        if self.norms.norms_reduction == "layer":
            raise ValueError(
                f"{self.norms.run_id} has one norm a layer, and attribution needs one a channel: "
                "record them with --reduce channel or kernel"
            )
        if self.norms.task.data != self.task.data:
            raise ValueError(
                f"{self.norms.run_id} has the norms of other data: name norms of the same task and "
                "data"
            )
        return self
