"""The training of one model, and the weights that it keeps."""

from pathlib import PurePath
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.specs.base import Model
from influence_jobs.specs.norms import NormsSpec
from influence_jobs.terms import Reduction


class TrainSpec(NormsSpec):
    """Train one model of a task from one seed.

    Attributes:
        save_epochs: Epochs (from 1) whose weights are kept; the last one always is.
        norm_layers: Layers whose batch-gradient norms are recorded (Algorithm 1 of the research
            report).
        norm_reduction: The axes of the norms that are kept; see `terms.Reduction`.
        norm_skip_epochs: Number of first epochs whose norms are not recorded; 1 in the research
            report.
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
        # Two ways to request the same training must give one hash.
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

    @property
    def layers_with_norms(self) -> tuple[str, ...]:
        return self.norm_layers

    @property
    def norms_reduction(self) -> Reduction:
        return self.norm_reduction


class TrainedCheckpoint(Model):
    """The weights that a train run saved after an epoch."""

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

    def words(self) -> str:
        return f"{self.train.run_id}, epoch {self.epoch}"


class FileCheckpoint(Model):
    """A state dict in a file, or in those of a folder, identified by its content."""

    locations = frozenset({"path"})
    path: str
    sha256: str

    def words(self) -> str:
        return f"{PurePath(self.path).name} (SHA-256 {self.sha256[:12]})"


Checkpoint = TrainedCheckpoint | FileCheckpoint
