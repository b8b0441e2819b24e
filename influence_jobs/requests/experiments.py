"""The options that experiments share: which methods are put to the test, of which training."""

from typing import TYPE_CHECKING

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


class SeedsOptions(Options):
    """How often each variant is trained."""

    seeds: One[Count] = option(
        1, "Trainings of each variant, each from another seed.", panel=EXPERIMENT
    )


class EnsembleOptions(Options):
    """Of how many models scores are."""

    ensemble: One[Count] = option(
        1, "Scores are the mean over models trained from so many seeds.", panel=EXPERIMENT
    )


class ExperimentRequest(WeightsRequest, QueriesOptions, CurvatureOptions):
    """Methods that are put to the test by retraining."""

    by: Many[str] = option(
        (),
        "attribution, helpful, harmful, random, loss, nearest, dot-product, or a run with scores "
        "(RUN+RUN: their mean; NAME=RUN: as tables shall call it). May be repeated.",
        panel=EXPERIMENT,
        metavar="METHOD",
    )

    def rankings(
        self, root: str, say: Say, default_methods: tuple[str, ...]
    ) -> "tuple[Trained, tuple[str, ...], Rankings]":
        """The training that is looked at, the methods, and what makes rankings by them.

        The queries are the task's first named set if the user named none.
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
