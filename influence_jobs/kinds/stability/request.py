"""The request for a stability run."""

from influence_jobs.kinds.stability.spec import StabilitySpec
from influence_jobs.requests.base import One, Say, option
from influence_jobs.requests.experiments import EnsembleOptions, ExperimentRequest
from influence_jobs.requests.options import EXPERIMENT
from influence_jobs.specs.base import Count, Spec, make_spec

METHODS = ("attribution", "helpful", "harmful")


class StabilityRequest(ExperimentRequest, EnsembleOptions):
    """Train from other seeds: how many of a query's top samples are found again?"""

    retrainings: One[Count] = option(
        5, "Number of retrainings to compare with the first training.", panel=EXPERIMENT
    )
    top: One[Count] = option(100, "Number of top samples to compare.", panel=EXPERIMENT)

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.requests.solving import require_used

        trained, words, rankings = self.rankings(root, say, METHODS)
        methods = rankings.after_trainings(
            words, retrainings=self.retrainings, ensemble=self.ensemble
        )
        require_used(self, words)
        task = trained.subject.task
        return (make_spec(StabilitySpec, task=task, methods=methods, top=self.top),)
