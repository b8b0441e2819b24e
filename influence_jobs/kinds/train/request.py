"""The request for a training."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from influence_jobs.errors import SpecError
from influence_jobs.kinds.train.spec import TrainSpec
from influence_jobs.requests.base import Many, One, Request, Say, option
from influence_jobs.requests.options import REDUCE, TRAINING
from influence_jobs.specs.base import Count, Seed, Spec
from influence_jobs.terms import JobPrecision, Reduction

if TYPE_CHECKING:
    from influence_jobs.tasks.base import Task

# Options that are fields of the spec, under the same names.
_FIELDS = (
    "epochs", "seed", "optimizer", "lr", "momentum", "nesterov", "weight_decay", "no_bias_decay",
    "schedule", "warmup", "step_every", "step_factor", "clip_norm", "batch_size",
)  # fmt: skip

_OF_RECORDED = ("task", "task_options", "recorded")


class TrainRequest(Request):
    """Train a model of a task; keep the weights of chosen epochs, and gradient norms on request."""

    preset: One[str | None] = option(
        None,
        "Training preset: a name such as ffdnet-report, or a YAML file of your own; by default the "
        "task's.",
    )
    epochs: One[Count | None] = option(None, "Epochs to train; by default the preset's.")
    seed: One[Seed] = option(
        0, "Seed of the initial weights, the order of samples, and their noise.", panel=TRAINING
    )
    save_epoch: Many[Count] = option(
        (), "Also keep the weights after this epoch. May be repeated.", panel=TRAINING
    )
    optimizer: Literal["sgd", "adam", "adamw"] | None = option(
        None, "Optimizer, as torch has it; by default the preset's, else sgd.", panel=TRAINING
    )
    lr: One[float | None] = option(None, "Learning rate; by default the preset's.", panel=TRAINING)
    momentum: One[float | None] = option(
        None, "Momentum of SGD; by default the preset's.", panel=TRAINING
    )
    nesterov: bool | None = option(
        None, "Nesterov's momentum in SGD; by default the preset's, else not.", panel=TRAINING
    )
    weight_decay: One[float | None] = option(
        None,
        "Weight decay: an L2 penalty, in adamw decoupled; by default the preset's, else 0, in "
        "adamw .01.",
        panel=TRAINING,
    )
    no_bias_decay: bool | None = option(
        None,
        "Leave biases and the weights of normalisation layers (parameters of one axis) without "
        "weight decay; by default as the preset says, else they decay too.",
        panel=TRAINING,
    )
    schedule: Literal["constant", "cosine", "linear", "step"] | None = option(
        None,
        "How the learning rate changes from step to step. cosine, linear: it falls to 0 at the "
        "end; step: it is multiplied by --step-factor every --step-every epochs. By default the "
        "preset's, else constant.",
        panel=TRAINING,
    )
    warmup: One[Annotated[int, Field(ge=0)] | None] = option(
        None,
        "Number of first steps (batches) in which the learning rate rises to --lr; by default the "
        "preset's, else none.",
        panel=TRAINING,
    )
    step_every: One[Count | None] = option(
        None, "Epochs between the steps of --schedule step.", panel=TRAINING
    )
    step_factor: One[float | None] = option(
        None,
        "Factor of --schedule step; by default the preset's, else .1.",
        panel=TRAINING,
        gt=0,
        le=1,
    )
    clip_norm: One[float | None] = option(
        None,
        "Scale the gradient of a batch down to this norm if it is larger; by default the preset's, "
        "else not.",
        panel=TRAINING,
        gt=0,
    )
    batch_size: One[Count | None] = option(
        None, "Samples in a step; by default the preset's.", panel=TRAINING
    )
    precision: JobPrecision | None = option(
        None,
        "tf32: products in TF32 on a GPU; by default all is computed in what the model is built "
        "in.",
        panel=TRAINING,
    )
    recorded: One[str | None] = option(
        None,
        "Folder of an influence_jobs.Recorder. The run is of the training that it recorded, with"
        " its weights and norms, and nothing is trained.",
    )
    norms_layer: Many[str | int] = option(
        (),
        "Record the norms of this layer's batch gradients during training (Algorithm 1 of the "
        "research report). May be repeated.",
        panel=TRAINING,
    )
    norms_skip_epochs: One[Annotated[int, Field(ge=0)] | None] = option(
        None, "Number of first epochs whose norms are not recorded; by default 1.", panel=TRAINING
    )
    reduce: Reduction | None = option(None, f"{REDUCE} By default channel.")

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        return (self.spec(say),)

    def spec(self, say: Say) -> TrainSpec:
        """The spec of the training."""
        from influence_jobs.requests.subject import recorded_training, task_of, training_of
        from influence_jobs.tasks.layers import resolve_weights

        task, built = task_of(self, say)
        if self.recorded is not None:
            for name in (n for n in type(self).model_fields if n not in _OF_RECORDED):
                if self.given(name):
                    option_name = name.replace("_", "-")
                    raise SpecError(f"--{option_name} has no meaning with --recorded: leave it out")
            return recorded_training(task, built, self.recorded)
        given: dict[str, Any] = {
            "precision": self._rounding(built),
            "save_epochs": self.save_epoch or None,
            **{name: getattr(self, name) for name in _FIELDS},
        }
        if self.norms_layer:
            given |= {
                "norm_layers": resolve_weights(self.norms_layer, built, say),
                "norm_reduction": self.reduce,
                "norm_skip_epochs": self.norms_skip_epochs,
            }
        else:
            for name in ("norms_skip_epochs", "reduce"):
                if getattr(self, name) is not None:
                    raise SpecError(f"--{name.replace('_', '-')} needs --norms-layer")
        return training_of(task, preset=self.preset, given=given, say=say)

    def _rounding(self, task: "Task") -> Literal["tf32"] | None:
        """TF32 if it is asked for.

        Raises:
            SpecError: It is another precision than that of the model.
        """
        from influence_jobs.tasks.placement import dtype_of

        if self.precision in (None, "tf32"):
            return self.precision
        built = str(dtype_of(task.model())).removeprefix("torch.")
        if self.precision != built:
            raise SpecError(
                f"--precision {self.precision}: a training computes in the number format that the "
                f"model is built in, here {built}; leave --precision out, use tf32, or build the "
                "model in another format"
            )
        return None
