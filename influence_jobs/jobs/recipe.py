"""From the spec of a training to the recipe of a trainer."""

from dataclasses import fields

from influence_jobs.kinds.train.spec import TrainSpec
from influence_jobs.training.recipe import Recipe


def recipe_of(spec: TrainSpec) -> Recipe:
    """The fields of a training that a trainer needs; the names are the same."""
    return Recipe(**{field.name: getattr(spec, field.name) for field in fields(Recipe)})
