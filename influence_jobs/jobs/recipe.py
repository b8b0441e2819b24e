"""From the spec of a training to the recipe of a trainer."""

from influence_jobs.kinds.train.spec import TrainSpec
from influence_jobs.training.train import Recipe


def recipe_of(spec: TrainSpec) -> Recipe:
    """The fields of a training that a trainer needs."""
    return Recipe(
        epochs=spec.epochs,
        batch_size=spec.batch_size,
        optimizer=spec.optimizer,
        lr=spec.lr,
        momentum=spec.momentum,
        weight_decay=spec.weight_decay,
    )
