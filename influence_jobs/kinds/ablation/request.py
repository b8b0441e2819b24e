"""What can be asked of an ablation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from influence_jobs.errors import SpecError
from influence_jobs.kinds.ablation.spec import AblationSpec, RelabelRule
from influence_jobs.requests.base import Many, Say, option
from influence_jobs.requests.experiments import ExperimentRequest, SeedsOptions
from influence_jobs.requests.options import EXPERIMENT
from influence_jobs.specs.base import Count, Spec, make_spec
from influence_jobs.specs.rankings import Ranking

if TYPE_CHECKING:
    from influence_jobs.requests.rankings import Trained

METHODS = ("attribution", "helpful", "harmful", "random")
SIZES = (200, 500, 1000, 2000, 5000, 10_000)  # the research report's


class AblationRequest(ExperimentRequest, SeedsOptions):
    """Retrain without a query's top k samples, or with other labels on them: what becomes of the query?

    Every retrained model is kept: a larger grid trains only what is new.
    """

    k: Many[Count] = option(
        (),
        "How many of the top samples are relabelled or removed. May be repeated; by default the "
        "research report's numbers, 200 to 10000.",
        panel=EXPERIMENT,
    )
    mode: Many[Literal["relabel", "remove"]] = option(
        ("relabel", "remove"),
        "relabel or remove the samples. May be repeated; by default both, in separate retrainings.",
        panel=EXPERIMENT,
    )
    relabel_to: RelabelRule = option(
        "report",
        "The new labels. report: class 0, or 1 for queries of class 0, as in the research report; "
        "next: the sample's class + 1; random: another class at random.",
        panel=EXPERIMENT,
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.requests.solving import require_used

        trained, methods, rankings = self.rankings(root, say, METHODS)
        ranked = [rankings.of(word) for word in methods]
        require_used(self, methods)
        spec = ablation_of(
            trained,
            ranked,
            sizes=self.k,
            modes=self.mode,
            relabel=self.relabel_to,
            seeds=self.seeds,
        )
        return (spec,)


def ablation_of(
    trained: "Trained",
    rankings: Sequence[Ranking],
    *,
    sizes: Sequence[int],
    modes: Sequence[str],
    relabel: RelabelRule,
    seeds: int,
) -> AblationSpec:
    """An ablation grid, refused at once if the task cannot have it.

    Args:
        sizes: The numbers k; if empty the research report's, as far as there are so many samples.
        seeds: How many, counted from the training's own.

    Raises:
        SpecError: As `require_ablation` says.
    """
    from influence_jobs.kinds.ablation.job import require_ablation

    built = trained.subject.built
    n = len(built.train_data())
    if "relabel" not in modes and relabel != "report":
        raise SpecError("--relabel-to has no meaning for --mode remove: leave it out")
    sizes = sizes or [k for k in SIZES if k < n]
    if not sizes:
        raise SpecError(f"--k: say how many of the {n:,} training samples")
    spec = make_spec(
        AblationSpec,
        task=trained.subject.task,
        recipe=trained.train,
        rankings=tuple(rankings),
        seeds=tuple(trained.train.seed + i for i in range(seeds)),
        sizes=tuple(sizes),
        modes=tuple(modes),
        relabel=relabel,
    )
    require_ablation(spec, n, built.output_loss)
    return spec
