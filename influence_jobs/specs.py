"""Frozen, validated requests. What a spec says decides what is computed; its hash names the run.

Two kinds of things stay out of the hash: where inputs happen to lie (paths), because their content is hashed instead,
and how the work is carried out (workers, batches, shards, devices), because it does not change the result.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from influence_jobs.errors import SpecError, StoreError
from influence_jobs.terms import Precision, Reduction

FORMAT = 1  # raise it when the same spec starts to mean other numbers

Option = bool | int | float | str | tuple[str, ...] | None


class Model(BaseModel):
    """A frozen value whose `identity` leaves out the fields named in `locations`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    locations: ClassVar[frozenset[str]] = frozenset()

    def identity(self) -> dict[str, Any]:
        """The part of the value that decides the result, as plain JSON data."""
        return {
            name: _plain(getattr(self, name))
            for name in type(self).model_fields
            if name not in self.locations
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Model):
        return value.identity()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


class TaskSpec(Model):
    """Which task, with which options, on which data.

    Attributes:
        name: A registered task, or `module:Class` for one's own.
        options: Keyword arguments of the task that change what is computed.
        paths: Keyword arguments of the task that say where its data lie on this machine.
        data: Fingerprint of the data found there (`Task.fingerprint`).
    """

    locations = frozenset({"paths"})
    name: str
    options: dict[str, Option] = {}
    paths: dict[str, str] = {}
    data: str

    @property
    def slug(self) -> str:
        """The task's name as it appears in run ids."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.rpartition(":")[2].lower()).strip("-")


class Spec(Model):
    """Base of all job requests."""

    kind: str
    task: TaskSpec

    @property
    def hash(self) -> str:
        """SHA-256 of the identity, in hex."""
        text = json.dumps({"format": FORMAT, **self.identity()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def run_id(self) -> str:
        """Kind, task and the first twelve digits of the hash, e.g. `train-mnist-3f2a91c04d5e`."""
        return f"{self.kind}-{self.task.slug}-{self.hash[:12]}"


class TrainSpec(Spec):
    """Train one model of a task from one seed.

    Attributes:
        save_epochs: Epochs (from 1) whose weights are kept; the last one always is.
        norm_layers: Module names whose batch-gradient norms are recorded (the report's Algorithm 1).
        norm_skip_epochs: First epochs left out of the recorded norms, as the original does with one.
    """

    kind: Literal["train"] = "train"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 8
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.003
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    save_epochs: tuple[Annotated[int, Field(ge=1)], ...] = ()
    norm_layers: tuple[str, ...] = ()
    norm_reduction: Reduction = "channel"
    norm_skip_epochs: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        # Two ways to ask for the same thing must give one hash.
        last = self.epochs
        beyond = [epoch for epoch in self.save_epochs if epoch > last]
        if beyond:
            raise ValueError(f"epoch {beyond[0]} cannot be saved: training ends after {last}")
        object.__setattr__(self, "save_epochs", tuple(sorted({*self.save_epochs, last})))
        if self.norm_layers and self.norm_skip_epochs >= last:
            raise ValueError(
                f"norms skip the first {self.norm_skip_epochs} epochs of {last}, so none would be "
                "recorded: train longer or lower the number"
            )
        if not self.norm_layers:
            object.__setattr__(self, "norm_reduction", "channel")
            object.__setattr__(self, "norm_skip_epochs", 1)
        if self.optimizer == "adam":
            object.__setattr__(self, "momentum", 0.0)
        return self


class TrainedCheckpoint(Model):
    """The weights of a train run after one of its saved epochs."""

    train: TrainSpec
    epoch: int

    @model_validator(mode="after")
    def _epoch_is_saved(self) -> Self:
        if self.epoch not in self.train.save_epochs:
            raise ValueError(
                f"epoch {self.epoch} of {self.train.run_id} is not saved; "
                f"saved: {', '.join(map(str, self.train.save_epochs))}"
            )
        return self


class FileCheckpoint(Model):
    """A state dict in a file, identified by its content."""

    locations = frozenset({"path"})
    path: str
    sha256: str


class GradNormsSpec(Spec):
    """Replay: per-sample gradient norms of layers at checkpoints, model in eval mode.

    Attributes:
        layers: Module names, in forward order.
        combine: Norms over several checkpoints are summed, or kept on a leading axis.
        seed: Seed of the samples' noise, where a task has noise.
    """

    kind: Literal["grad-norms"] = "grad-norms"
    checkpoints: Annotated[tuple[TrainedCheckpoint | FileCheckpoint, ...], Field(min_length=1)]
    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    reduction: Reduction = "channel"
    combine: Literal["sum", "keep"] = "sum"
    precision: Precision = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        if self.combine == "sum":  # a sum has no order
            ordered = sorted(self.checkpoints, key=lambda c: json.dumps(c.identity()))
            object.__setattr__(self, "checkpoints", tuple(ordered))
        return self


AnySpec = TrainSpec | GradNormsSpec
_ANY_SPEC: TypeAdapter[AnySpec] = TypeAdapter(Annotated[AnySpec, Field(discriminator="kind")])


def parse_spec(text: bytes | str, where: str) -> AnySpec:
    """Read a spec back from JSON; `where` names it in the error.

    Raises:
        StoreError: The text is no spec of ours.
    """
    try:
        return _ANY_SPEC.validate_json(text)
    except ValidationError as error:
        raise StoreError(f"{where} is not a readable spec: {_first(error)}") from error


S = TypeVar("S", bound=Spec)


def make_spec(kind: type[S], **fields: Any) -> S:
    """Build a spec from a user's values.

    Raises:
        SpecError: A value is out of range; the message names the field.
    """
    try:
        return kind(**fields)
    except ValidationError as error:
        raise SpecError(f"cannot {kind.model_fields['kind'].default}: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message
