"""Rankings of the training samples, and the experiments that test them by retraining."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from influence_jobs.kinds.train.spec import TrainSpec
from influence_jobs.specs.base import Model, Seed, Spec, TaskSpec, in_words
from influence_jobs.specs.queries import Queries
from influence_jobs.specs.scores import AnyScores


class Ranking(Model):
    """The training samples in the order of one method's scores.

    Attributes:
        name: The method's name in tables: attribution, helpful, random, ...
        scores: The runs with the scores. Several runs are an ensemble: their mean is ranked.
        largest: Whether the largest scores come first, or the smallest.
    """

    name: str
    scores: Annotated[tuple[AnyScores, ...], Field(min_length=1)]
    largest: bool = True

    @model_validator(mode="after")
    def _one_set_of_queries(self) -> Self:
        for scores in self.scores:
            if scores.top_only:
                raise ValueError(
                    f"{scores.run_id} has scores of the first samples only: leave --approximate out"
                )
        for other in self.scores[1:]:
            if other.queries != self.queries:
                raise ValueError(
                    f"{other.run_id} has other queries than {self.scores[0].run_id}: "
                    "an ensemble needs the same queries with the same noise "
                    "(--seed, --noise-draws)"
                )
        return self

    @property
    def queries(self) -> Queries:
        """The queries, one a row of the scores."""
        return self.scores[0].queries

    def words(self) -> str:
        order = "" if self.largest else ", smallest first"
        return f"{self.name} ({in_words(self.scores)}{order})"


def _require_same_samples(run_id: str, task: TaskSpec, trained: TaskSpec) -> None:
    """Refuse a task whose sample ids name other samples than in a training."""
    same = task.name == trained.name and task.data == trained.data
    # A training's task keeps only the options that training depends on.
    other = [k for k, v in trained.options.items() if task.options.get(k) != v]
    if not same or other:
        what = f"option {other[0]}" if same else "task or data"
        raise ValueError(
            f"{run_id} is of another {what}, where ids mean other samples: name a run of the same "
            "task, options and data"
        )


def require_alike(rankings: tuple[Ranking, ...], trained: TaskSpec) -> None:
    """Refuse rankings that cannot be compared.

    Raises:
        ValueError: They differ in queries or samples, or two have one name.
    """
    names = [ranking.name for ranking in rankings]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"method {name} is named twice")
    for ranking in rankings:
        for scores in ranking.scores:
            _require_same_samples(scores.run_id, scores.task, trained)
            if scores.queries != rankings[0].queries:
                raise ValueError(
                    f"{scores.run_id} has other queries than {rankings[0].scores[0].run_id}: "
                    "methods are compared on the same queries with the same noise "
                    "(--seed, --noise-draws)"
                )


class RetrainingSpec(Spec):
    """Base of the experiments that train many variants of one model.

    Attributes:
        recipe: How each variant is trained; its seed, norms and saved epochs are ignored.
        rankings: The rankings under test, all with the same queries.
        seeds: Each variant is trained once from each seed.
    """

    recipe: TrainSpec
    rankings: Annotated[tuple[Ranking, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)

    @model_validator(mode="after")
    def _normalise_recipe(self) -> Self:
        given = self.recipe
        if given.trainer == "recorded":
            raise ValueError(
                f"{given.run_id} was recorded elsewhere, so it cannot be repeated: name another "
                "train run"
            )
        plain = given.model_copy(update={"seed": 0, "save_epochs": (), "norm_layers": ()})
        object.__setattr__(self, "recipe", TrainSpec.model_validate(plain.model_dump()))
        _require_same_samples("the experiment", self.task, given.task)
        require_alike(self.rankings, given.task)
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is named twice")
        return self

    @property
    def queries(self) -> Queries:
        """The queries that every variant is measured on."""
        return self.rankings[0].queries


class SubsetsSpec(RetrainingSpec):
    """Base of the experiments that retrain models on random subsets.

    Attributes:
        fraction: Fraction of the training set in each subset.
        own_starts: Whether each training of a subset has initial weights of its own. In runs made
            before there was a choice, all trainings of a subset have the same.
    """

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    own_starts: bool = False

    @model_validator(mode="after")
    def _one_seed_has_one_start(self) -> Self:
        if self.seeds == (0,):
            object.__setattr__(self, "own_starts", False)
        return self

    @model_validator(mode="after")
    def _scores_are_taken_as_they_are(self) -> Self:
        for ranking in self.rankings:
            if not ranking.largest:
                raise ValueError(
                    f"sums of scores have no smallest-first order: leave method {ranking.name} out"
                )
        return self
