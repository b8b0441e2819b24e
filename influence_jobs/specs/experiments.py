"""Requests for experiments that put scores to the test: ablation, stability, linear datamodeling score, and sets of runs."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.specs.base import Model, Spec, TaskSpec
from influence_jobs.specs.scores import (
    AttributionSpec,
    BaselineSpec,
    Count,
    InfluenceSpec,
    Queries,
    Seed,
)
from influence_jobs.specs.training import GradNormsSpec, TrainSpec

RelabelRule = Literal["report", "next", "random"]
AnyScores = Annotated[InfluenceSpec | AttributionSpec | BaselineSpec, Field(discriminator="kind")]


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


def _require_same_samples(run_id: str, task: TaskSpec, trained: TaskSpec) -> None:
    """Refuse a task whose sample ids do not mean what they mean in a training."""
    same = task.name == trained.name and task.data == trained.data
    # A training's task has no options but those that it looks at.
    other = [k for k, v in trained.options.items() if task.options.get(k) != v]
    if not same or other:
        what = f"option {other[0]}" if same else "task or data"
        raise ValueError(f"{run_id} is of another {what}: ids mean other samples there")


def _require_alike(rankings: tuple[Ranking, ...], trained: TaskSpec) -> None:
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
        _require_alike(self.rankings, given.task)
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is named twice")
        return self

    @property
    def queries(self) -> Queries:
        """What is measured of every variant."""
        return self.rankings[0].queries


class AblationSpec(RetrainingSpec):
    """Retrain without a query's top k samples, or with other labels on them, and look at the query.

    Attributes:
        sizes: The numbers k.
        modes: Remove the samples, relabel them, or one after the other.
        relabel: report: all to class 0, or 1 if the query's class is 0; next: each to its class + 1; random: each to
            another class, at random.
    """

    kind: Literal["ablation"] = "ablation"
    sizes: Annotated[tuple[Count, ...], Field(min_length=1)]
    modes: Annotated[tuple[Literal["relabel", "remove"], ...], Field(min_length=1)]
    relabel: RelabelRule = "report"

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        object.__setattr__(self, "sizes", tuple(sorted(set(self.sizes))))
        object.__setattr__(self, "modes", tuple(sorted(set(self.modes))))
        if "relabel" not in self.modes:
            object.__setattr__(self, "relabel", "report")
        return self


class LdsSpec(RetrainingSpec):
    """Linear datamodeling score: do sums of scores predict the losses of models retrained on random subsets?

    Park et al. 2023, "TRAK: Attributing Model Behavior at Scale".

    Attributes:
        subsets: How many.
        fraction: Of the training set in each.
    """

    kind: Literal["lds"] = "lds"
    subsets: Annotated[int, Field(ge=3)] = 100
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5

    @model_validator(mode="after")
    def _scores_are_taken_as_they_are(self) -> Self:
        for ranking in self.rankings:
            if not ranking.largest:
                raise ValueError(
                    f"sums of scores have no other end: leave method {ranking.name} out"
                )
        return self


class StabilitySpec(Spec):
    """How much of a ranking is left when the model is trained anew from other seeds.

    Attributes:
        methods: Rankings of one method from several trainings: the first is compared with each of the others.
        top: Size of the heads that are compared.
    """

    kind: Literal["stability"] = "stability"
    methods: Annotated[
        tuple[Annotated[tuple[Ranking, ...], Field(min_length=2)], ...], Field(min_length=1)
    ]
    top: Count = 100

    @model_validator(mode="after")
    def _rankings_are_alike(self) -> Self:
        _require_alike(tuple(rankings[0] for rankings in self.methods), self.task)
        for rankings in self.methods:
            for ranking in rankings:
                if ranking.name != rankings[0].name or ranking.largest != rankings[0].largest:
                    raise ValueError(f"{ranking.name} is compared with {rankings[0].name}")
                _require_alike((rankings[0].model_copy(update={"name": ""}), ranking), self.task)
        return self

    @property
    def queries(self) -> Queries:
        """The queries of all rankings."""
        return self.methods[0][0].queries


class PaperSpec(Spec):
    """Runs that belong together: the experiments of a section of the report.

    Attributes:
        parts: In the order of the report.
    """

    kind: Literal["paper"] = "paper"
    parts: Annotated[
        tuple[
            Annotated[
                StabilitySpec
                | AblationSpec
                | LdsSpec
                | InfluenceSpec
                | AttributionSpec
                | BaselineSpec
                | GradNormsSpec
                | TrainSpec,
                Field(discriminator="kind"),
            ],
            ...,
        ],
        Field(min_length=1),
    ]
