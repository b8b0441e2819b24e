"""The request for an ablation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from influence_jobs.errors import SpecError
from influence_jobs.kinds.ablation.spec import AblationSpec, RelabelRule
from influence_jobs.requests.base import Many, Say, option
from influence_jobs.requests.experiments import ExperimentRequest, SeedsOptions, require_same_run
from influence_jobs.requests.options import EXPERIMENT
from influence_jobs.specs.base import Count, Spec, make_spec
from influence_jobs.specs.rankings import Ranking

if TYPE_CHECKING:
    from influence_jobs.requests.rankings import Trained

METHODS = ("attribution", "helpful", "harmful", "random")
SIZES = (200, 500, 1000, 2000, 5000, 10_000)  # of the research report


class AblationRequest(ExperimentRequest, SeedsOptions):
    """Remove or relabel a query's top k samples, retrain, and measure the query again.

    Every retrained model is kept, so a larger grid trains only its new models.
    """

    k: Many[Count] = option(
        (),
        "How many of the top samples are relabelled or removed. May be repeated; by default the "
        "research report's numbers, 200 to 10000.",
        panel=EXPERIMENT,
    )
    mode: Many[Literal["relabel", "remove"]] = option(
        ("relabel", "remove"),
        "What is done to the samples. May be repeated; by default both, each in retrainings of "
        "its own.",
        panel=EXPERIMENT,
    )
    relabel_to: RelabelRule = option(
        "report",
        "The new labels. report: class 0, or 1 for queries of class 0, as in the research report; "
        "next: the sample's class + 1; random: another class at random.",
        panel=EXPERIMENT,
    )

    same_run: bool = option(
        False,
        "Remove samples by a mask: their loss has weight 0. The order and the batches of the "
        "others and all random numbers stay as in the unchanged training, so that the noise of "
        "another order is not in the comparison.",
        panel=EXPERIMENT,
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.requests.solving import require_used

        trained, methods, rankings = self.rankings(root, say, METHODS)
        if self.same_run:
            if "remove" not in self.mode:
                raise SpecError("--same-run has no meaning for --mode relabel: leave it out")
            require_same_run(trained)
        ranked = [rankings.of(word) for word in methods]
        require_used(self, methods)
        spec = ablation_of(
            trained,
            ranked,
            sizes=self.k,
            modes=self.mode,
            relabel=self.relabel_to,
            seeds=self.seeds,
            same_run=self.same_run,
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
    same_run: bool = False,
) -> AblationSpec:
    """The spec of an ablation.

    Args:
        sizes: The numbers k; if empty, those numbers of the research report that are smaller than
            the training set.
        seeds: Number of seeds, counted from the training's own.
        same_run: As in `AblationSpec`.

    Raises:
        SpecError: The task cannot have this grid; see `require_ablation`.
    """
    from influence_jobs.kinds.ablation.job import require_ablation
    from influence_jobs.training.changes import require_classes

    built = trained.subject.built
    n = len(built.train_data())
    if "relabel" not in modes and relabel != "report":
        raise SpecError("--relabel-to has no meaning for --mode remove: leave it out")
    sizes = sizes or [k for k in SIZES if k < n]
    if not sizes:
        raise SpecError(
            f"--k has no default for as few as {n:,} training samples: give one or more numbers "
            "below that"
        )
    spec = make_spec(
        AblationSpec,
        task=trained.subject.task,
        recipe=trained.train,
        rankings=tuple(rankings),
        seeds=tuple(trained.train.seed + i for i in range(seeds)),
        sizes=tuple(sizes),
        modes=tuple(modes),
        relabel=relabel,
        same_run=same_run,
    )
    require_ablation(spec, built)
    if "relabel" in modes:
        require_classes(built, by_task=trained.train.trainer == "task")
    return spec
