"""The training of one model, and the weights that it keeps."""

from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.specs.base import Count, Model, Positive
from influence_jobs.specs.norms import NormsSpec
from influence_jobs.terms import Optimizer, Reduction, Schedule


class FileCheckpoint(Model):
    """A state dict in a file, or in those of a folder, identified by its content."""

    locations = frozenset({"path"})
    path: str
    sha256: str

    @property
    def repeatable(self) -> bool:
        """Whether it says how it was trained."""
        return False

    def words(self) -> str:
        return f"{PurePath(self.path).name} (SHA-256 {self.sha256[:12]})"


# What pages say only if it is asked for.
_REFINEMENTS = (
    "trainer", "nesterov", "no_bias_decay", "schedule", "warmup", "step_every", "step_factor",
    "precision",
)  # fmt: skip
# What a training by the task itself does not have.
_OF_OURS = {
    "epochs", "batch_size", "optimizer", "momentum", "weight_decay", "schedule", "save_epochs",
    "norm_reduction", "norm_skip_epochs",
}  # fmt: skip
_OF_RECORDINGS = {"epochs", "save_epochs", "norm_reduction", "norm_skip_epochs"}


class TrainSpec(NormsSpec):
    """Train one model of a task from one seed.

    What a task decides itself is "task" here, and what belongs to it has no value of its own.

    Attributes:
        trainer: "task" if the task has a training of its own (`Task.train`): a single call, that is
            one epoch. "recorded": a training elsewhere, of which a `Recorder` kept what is here.
        recorded: The folder of that recorder.
        optimizer: "task" if the task gives it (`Task.optimizer`).
        lr: None if the task gives the optimizer.
        momentum: Of SGD, as `nesterov`.
        no_bias_decay: Whether weight decay spares parameters of one axis: biases, and the weights
            of normalisation layers.
        schedule: How the learning rate changes, step by step; "task" if the task gives it
            (`Task.scheduler`).
        warmup: Number of first steps in which the rate rises linearly to `lr`.
        step_every: Of the schedule "step": after so many epochs each the rate is multiplied by
            `step_factor`.
        clip_norm: A batch gradient of all parameters with a larger norm is scaled down to this one.
        save_epochs: Epochs (from 1) whose weights are kept; the last one always is.
        norm_layers: Layers whose batch-gradient norms are recorded (Algorithm 1 of the research
            report).
        norm_reduction: The axes of the norms that are kept; see `terms.Reduction`.
        norm_skip_epochs: Number of first epochs whose norms are not recorded; 1 in the research
            report.
        precision: With tf32 GPUs round the factors of float32 products to TF32; None: nothing is
            computed in less than what the model is built in.
    """

    kind: Literal["train"] = "train"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    trainer: Literal["infl", "task", "recorded"] = "infl"
    recorded: FileCheckpoint | None = None
    epochs: Count = 20
    batch_size: Count = 8
    optimizer: Optimizer = "sgd"
    lr: Positive | None = 0.003
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    no_bias_decay: bool = False
    schedule: Schedule = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    step_every: Count | None = None
    step_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    clip_norm: Positive | None = None
    save_epochs: tuple[Annotated[int, Field(ge=1)], ...] = ()
    norm_layers: tuple[str, ...] = ()
    norm_reduction: Reduction = "channel"
    norm_skip_epochs: Annotated[int, Field(ge=0)] = 1
    precision: Literal["tf32"] | None = None

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        # Two ways to request the same training must give one hash.
        fixed: dict[str, Any] = {}
        if (self.trainer == "recorded") != (self.recorded is not None):
            raise ValueError("a recorded training has a recording, and no other has one")
        if self.trainer != "infl":
            fixed |= {"optimizer": "task", "schedule": "task", "batch_size": 1, "clip_norm": None}
        if self.trainer == "task":
            fixed |= {"epochs": 1, "norm_layers": ()}
            object.__setattr__(self, "save_epochs", ())
        optimizer = fixed.get("optimizer", self.optimizer)
        if optimizer != "sgd":
            fixed |= {"momentum": 0.0, "nesterov": False}
        if optimizer == "task":
            fixed |= {"lr": None, "weight_decay": 0.0}
        if fixed.get("weight_decay", self.weight_decay) == 0:
            fixed |= {"no_bias_decay": False}
        schedule = fixed.get("schedule", self.schedule)
        if schedule == "task":
            fixed |= {"warmup": 0}
        if schedule != "step":
            fixed |= {"step_every": None, "step_factor": 0.1}
        for name, value in fixed.items():
            object.__setattr__(self, name, value)
        if self.lr is None and self.optimizer != "task":
            raise ValueError(f"{self.optimizer} needs --lr")
        if self.nesterov and self.momentum == 0:
            raise ValueError("--nesterov needs a --momentum above 0")
        if self.schedule == "step" and self.step_every is None:
            raise ValueError("--schedule step needs --step-every, the epochs between its steps")
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
        return self

    @property
    def unsaid(self) -> frozenset[str]:
        plain = {name for name in _REFINEMENTS if name not in self.identity()}
        if self.trainer == "task":
            return frozenset(plain | _OF_OURS)
        if self.trainer == "recorded":
            return frozenset(plain | _OF_OURS - _OF_RECORDINGS | {"seed"})
        if self.optimizer == "task":
            return frozenset(plain | {"momentum", "weight_decay"})
        return frozenset(plain)

    @property
    def follows_gradient(self) -> bool:
        """Whether it follows the gradient of the mean loss, at rates that can be read here.

        Adam's steps have another length in each direction, which depends on the gradients that it
        saw. What a task decides, and how often a norm was clipped, cannot be read from the spec.
        """
        return self.optimizer == "sgd" and self.schedule != "task" and self.clip_norm is None

    def how(self) -> str:
        """How the model is trained, in a few words."""
        if self.trainer == "task":
            return "the task's own train()"
        optimizer = f"{self.optimizer}, lr {self.lr:g}"
        if self.lr is None:
            optimizer = "the task's own optimizer"
        rounded = ", in TF32" if self.precision else ""
        return f"{self.epochs} epochs of {optimizer}, batches of {self.batch_size}{rounded}"

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

    @property
    def repeatable(self) -> bool:
        """Whether it says how it was trained."""
        return self.train.trainer != "recorded"

    def words(self) -> str:
        return f"{self.train.run_id}, epoch {self.epoch}"


Checkpoint = TrainedCheckpoint | FileCheckpoint
