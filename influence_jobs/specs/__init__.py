"""Frozen, validated requests: what can be asked for."""

from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from influence_jobs.errors import StoreError
from influence_jobs.specs.base import Model, Spec, TaskSpec, first_error, make_spec
from influence_jobs.specs.experiments import (
    AblationSpec,
    AnyScores,
    LdsSpec,
    PaperSpec,
    Ranking,
    RelabelRule,
    RetrainingSpec,
    StabilitySpec,
)
from influence_jobs.specs.scores import (
    AttributionSpec,
    BaselineSpec,
    ConjugateGradient,
    Curvature,
    EkFac,
    Identity,
    InfluenceSpec,
    Lissa,
    Queries,
    Query,
    ScoresSpec,
    Solver,
    STestSpec,
)
from influence_jobs.specs.training import (
    Checkpoint,
    FileCheckpoint,
    GradNormsSpec,
    TrainedCheckpoint,
    TrainSpec,
)

__all__ = [
    "AblationSpec",
    "AnyScores",
    "AnySpec",
    "AttributionSpec",
    "BaselineSpec",
    "Checkpoint",
    "ConjugateGradient",
    "Curvature",
    "EkFac",
    "FileCheckpoint",
    "GradNormsSpec",
    "Identity",
    "InfluenceSpec",
    "LdsSpec",
    "Lissa",
    "Model",
    "PaperSpec",
    "Queries",
    "Query",
    "Ranking",
    "RelabelRule",
    "RetrainingSpec",
    "STestSpec",
    "ScoresSpec",
    "Solver",
    "Spec",
    "StabilitySpec",
    "TaskSpec",
    "TrainSpec",
    "TrainedCheckpoint",
    "make_spec",
    "parse_spec",
]

AnySpec = (
    TrainSpec
    | GradNormsSpec
    | STestSpec
    | InfluenceSpec
    | AttributionSpec
    | BaselineSpec
    | AblationSpec
    | LdsSpec
    | StabilitySpec
    | PaperSpec
)
_ANY_SPEC: TypeAdapter[AnySpec] = TypeAdapter(Annotated[AnySpec, Field(discriminator="kind")])


def parse_spec(text: bytes | str, where: str) -> AnySpec:
    """Read a spec back from JSON; `where` names it in the error.

    Raises:
        StoreError: The text is no spec of ours.
    """
    try:
        return _ANY_SPEC.validate_json(text)
    except ValidationError as error:
        raise StoreError(f"{where} is not a readable spec: {first_error(error)}") from error
