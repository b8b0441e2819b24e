"""Rankings of the training samples, and the experiments that retrain to test them."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from influence_jobs.kinds.train.spec import TrainSpec
from influence_jobs.specs.base import Model, Seed, Spec, TaskSpec, in_words
from influence_jobs.specs.queries import Queries
from influence_jobs.specs.scores import AnyScores


class Ranking(Model):
    """The training samples in the order of one method's scores.

    Attributes:
        name: The method, as tables show it: attribution, helpful, random, ...
        scores: The runs with the scores; of several (an ensemble) the mean counts.
        largest: The largest scores come first, else the smallest.
    """

    name: str
    scores: Annotated[tuple[AnyScores, ...], Field(min_length=1)]
    largest: bool = True

    @model_validator(mode="after")
    def _one_set_of_queries(self) -> Self:
        for other in self.scores[1:]:
            if other.asked != self.queries:
                raise ValueError(
                    f"{other.run_id} has other queries than {self.scores[0].run_id}: "
                    "an ensemble is of the same queries, with the same noise (--seed, --noise-draws)"
                )
        return self

    @property
    def queries(self) -> Queries:
        """The queries of its rows."""
        return self.scores[0].asked

    def words(self) -> str:
        order = "" if self.largest else ", smallest first"
        return f"{self.name} ({in_words(self.scores)}{order})"


def _require_same_samples(run_id: str, task: TaskSpec, trained: TaskSpec) -> None:
    """Refuse a task whose sample ids do not mean what they mean in a training."""
    same = task.name == trained.name and task.data == trained.data
    # A training's task has no options but those that it looks at.
    other = [k for k, v in trained.options.items() if task.options.get(k) != v]
    if not same or other:
        what = f"option {other[0]}" if same else "task or data"
        raise ValueError(f"{run_id} is of another {what}: ids mean other samples there")


def require_alike(rankings: tuple[Ranking, ...], trained: TaskSpec) -> None:
    """Refuse rankings that cannot be compared: other queries, other samples, or one name twice."""
    names = [ranking.name for ranking in rankings]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"method {name} is named twice")
    for ranking in rankings:
        for scores in ranking.scores:
            _require_same_samples(scores.run_id, scores.task, trained)
            if scores.asked != rankings[0].queries:
                raise ValueError(
                    f"{scores.run_id} has other queries than {rankings[0].scores[0].run_id}: "
                    "methods are compared on the same queries, with the same noise (--seed, --noise-draws)"
                )


class RetrainingSpec(Spec):
    """Base of the experiments that train many variants of one model.

    Attributes:
        recipe: How each variant is trained; its seed, norms and saved epochs do not count.
        rankings: What is put to the test, all with the same queries.
        seeds: Each variant is trained once with each of them.
    """

    recipe: TrainSpec
    rankings: Annotated[tuple[Ranking, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)

    @model_validator(mode="after")
    def _normalise_recipe(self) -> Self:
        given = self.recipe
        plain = given.model_copy(update={"seed": 0, "save_epochs": (), "norm_layers": ()})
        object.__setattr__(self, "recipe", TrainSpec.model_validate(plain.model_dump()))
        _require_same_samples("the experiment", self.task, given.task)
        require_alike(self.rankings, given.task)
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is named twice")
        return self

    @property
    def queries(self) -> Queries:
        """What is measured of every variant."""
        return self.rankings[0].queries
