"""The options that experiments share: the methods under test, and the training."""

from typing import TYPE_CHECKING

from influence_jobs.errors import SpecError
from influence_jobs.kinds.baseline.spec import METHODS as BASELINES
from influence_jobs.requests.base import Many, One, Options, Say, option
from influence_jobs.requests.options import (
    EXPERIMENT,
    CurvatureOptions,
    QueriesOptions,
    WeightsRequest,
)
from influence_jobs.specs.base import Count

if TYPE_CHECKING:
    from influence_jobs.requests.rankings import Rankings, Trained

INFLUENCE = ("helpful", "harmful", "dot-product", "cosine")
METHODS = ("attribution", *INFLUENCE, *BASELINES)


class SeedsOptions(Options):
    """Number of trainings of each variant."""

    seeds: One[Count] = option(
        1, "Number of trainings of each variant, each from another seed.", panel=EXPERIMENT
    )


class EnsembleOptions(Options):
    """Number of models that scores are averaged over."""

    ensemble: One[Count] = option(
        1, "Average the scores of so many models, trained from different seeds.", panel=EXPERIMENT
    )


class ExperimentRequest(WeightsRequest, QueriesOptions, CurvatureOptions):
    """Base of the requests that test methods by retraining."""

    by: Many[str] = option(
        (),
        f"A method to test: {', '.join(METHODS)}; a run with scores (RUN, NAME=RUN, or RUN+RUN for "
        "their mean); or scores from elsewhere (NAME=FILE): (queries, training samples) as .npy, "
        ".parquet or .zarr, positive = helpful. May be repeated.",
        panel=EXPERIMENT,
        metavar="METHOD",
    )

    def rankings(
        self, root: str, say: Say, default_methods: tuple[str, ...]
    ) -> "tuple[Trained, tuple[str, ...], Rankings]":
        """The training, the names of the methods, and the `Rankings` to make rankings with.

        If the user names no queries, the task's first named set is taken.
        """
        from influence_jobs.requests.queries import queries_of
        from influence_jobs.requests.rankings import Rankings, recipe_for_file, trained_of
        from influence_jobs.requests.subject import subject_of

        methods = self.by or default_methods
        subject = subject_of(self, root, say, retrains=True)
        trained = trained_of(
            subject,
            given=bool(self.checkpoint),
            methods=methods,
            recipe=recipe_for_file(subject, self, say),
        )
        queries = queries_of(self, subject.built, default_set=True)
        rankings = Rankings(trained, queries, self, root=root, seed=self.seed, say=say)
        return trained, methods, rankings


def require_same_run(trained: "Trained") -> None:
    """Refuse a model whose training cannot be repeated with masks.

    Raises:
        SpecError: It came from elsewhere, or the task trains it.
    """
    if any(not checkpoint.repeatable for checkpoint in trained.subject.checkpoints):
        raise SpecError(
            "--same-run repeats a training, and it is not known how this checkpoint was trained: "
            "name a train run with --checkpoint, or leave --same-run out"
        )
    if trained.train.trainer == "task":
        raise SpecError(
            f"train() of task {trained.train.task.name} cannot mask samples: leave --same-run out, "
            "or give the task an optimizer() in place of train()"
        )
