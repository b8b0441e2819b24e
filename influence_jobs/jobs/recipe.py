"""How a spec says that a model is trained."""

from influence_jobs.kinds.train.spec import TrainSpec
from influence_jobs.training.train import Recipe


def recipe_of(spec: TrainSpec) -> Recipe:
    """What a trainer needs to know of a training."""
    return Recipe(
        epochs=spec.epochs,
        batch_size=spec.batch_size,
        optimizer=spec.optimizer,
        lr=spec.lr,
        momentum=spec.momentum,
        weight_decay=spec.weight_decay,
    )
