"""What can be asked of a training."""

from typing import Annotated, Any, Literal

from pydantic import Field

from influence_jobs.errors import SpecError
from influence_jobs.kinds.train.spec import TrainSpec
from influence_jobs.requests.base import Many, One, Request, Say, option
from influence_jobs.requests.options import REDUCE, TRAINING
from influence_jobs.specs.base import Count, Seed, Spec
from influence_jobs.terms import Reduction


class TrainRequest(Request):
    """Train a model of a task; keeps weights at chosen epochs, and gradient norms if asked."""

    preset: One[str | None] = option(None, "Training preset: a name, or a YAML file of your own.")
    epochs: One[Count | None] = option(None, "Epochs to train; the preset's by default.")
    seed: One[Seed] = option(0, "Of weights, order and noise.", panel=TRAINING)
    save_epoch: Many[Count] = option(
        (), "Keep the weights of this epoch too. May be repeated.", panel=TRAINING
    )
    optimizer: Literal["sgd", "adam"] | None = option(
        None, "The preset's, else sgd, by default.", panel=TRAINING
    )
    lr: One[float | None] = option(None, "Learning rate.", panel=TRAINING)
    momentum: One[float | None] = option(None, "Of SGD.", panel=TRAINING)
    weight_decay: One[float | None] = option(None, "L2 penalty.", panel=TRAINING)
    batch_size: One[Count | None] = option(None, "Samples a step.", panel=TRAINING)
    norms_layer: Many[str | int] = option(
        (),
        "Record this layer's batch-gradient norms while training (Algorithm 1). May be repeated.",
        panel=TRAINING,
    )
    norms_skip_epochs: One[Annotated[int, Field(ge=0)] | None] = option(
        None, "First epochs not recorded; 1 by default.", panel=TRAINING
    )
    reduce: Reduction | None = option(None, f"{REDUCE} By default channel.")

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        return (self.spec(say),)

    def spec(self, say: Say) -> TrainSpec:
        """The training that is asked for."""
        from influence_jobs.requests.subject import task_of, training_of
        from influence_jobs.tasks.layers import resolve_weights

        task, built = task_of(self, say)
        given: dict[str, Any] = {
            "save_epochs": self.save_epoch or None,
            **{
                name: getattr(self, name)
                for name in (
                    "epochs",
                    "seed",
                    "optimizer",
                    "lr",
                    "momentum",
                    "weight_decay",
                    "batch_size",
                )
            },
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
        return training_of(task, preset=self.preset, given=given)
