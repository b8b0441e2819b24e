"""The request for the experiments of the research report."""

from typing import TYPE_CHECKING, Any

from influence_jobs.errors import SpecError
from influence_jobs.kinds.ablation.request import SIZES, ablation_of
from influence_jobs.kinds.paper.spec import PaperSpec
from influence_jobs.kinds.stability.spec import StabilitySpec
from influence_jobs.kinds.train.spec import TrainedCheckpoint
from influence_jobs.requests.base import Say, option
from influence_jobs.requests.options import (
    EXPERIMENT,
    CurvatureOptions,
    WeightsRequest,
)
from influence_jobs.specs.base import Spec, make_spec
from influence_jobs.specs.norms import NormsSpec
from influence_jobs.specs.queries import Queries, Query

if TYPE_CHECKING:
    from influence_jobs.requests.subject import Subject

METHODS = ("attribution", "helpful", "harmful")
LISSA_DAMPING = 0.25  # effective damping of LiSSA in the research report: .01 x 25
CURVATURE_SAMPLES, QUICK_CURVATURE_SAMPLES = 2000, 200
QUICK_SIZES = (1000, 5000)


class PaperRequest(WeightsRequest):
    """The experiments of the research report: section 4.1 (MNIST), or 4.2 with --task ffdnet.

    It prints the tables and writes a page with all figures into the run's folder.
    """

    quick: bool = option(
        False, "Short trainings and a small grid: minutes instead of hours.", panel=EXPERIMENT
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.requests.subject import subject_of
        from influence_jobs.tasks.registry import name_of

        request = self
        if self.task is not None or not self.checkpoint:
            name = name_of(self.task or self.default_task)
            published = _published(name)
            if self.quick and not self.checkpoint:
                options = dict(self.task_options)
                if published.quick_samples:
                    options = {"limit": published.quick_samples, **options}
                epochs = self.epochs or published.quick_epochs
                request = self.model_copy(update={"epochs": epochs, "task_options": options})
        subject = subject_of(request, root, say)
        section = {"4.1": _section_4_1, "4.2": _section_4_2}[_published(subject.task.name).section]
        given = bool(self.checkpoint)
        return (section(subject, say, given=given, quick=self.quick),)


def _published(task: str) -> Any:
    """The published facts about a task.

    Raises:
        SpecError: The research report has no experiments with it.
    """
    from influence_jobs.tasks.registry import task_class

    found = task_class(task).published
    if found is None:
        raise SpecError(
            f"the research report has no experiments with task {task}: choose mnist or ffdnet, or "
            "run infl submit stability, ablation or lds"
        )
    return found


def _section_4_1(subject: "Subject", say: Say, *, given: bool, quick: bool) -> PaperSpec:
    """Section 4.1: top samples of output nodes and ten test images, stability, ablation."""
    from influence_jobs.requests.rankings import Rankings, changed, trained_at, trained_of
    from influence_jobs.tasks.layers import weight_layers

    trained = trained_of(subject, given=given, methods=())
    if not given:
        # Figure 4.1 needs the norms of the last layer too.
        layers = weight_layers(subject.built, subject.built.model())
        skipped = int(trained.train.epochs > 1)
        train = changed(trained.train, norm_layers=layers, norm_skip_epochs=skipped)
        trained = trained_at(subject, train)
    subject = trained.subject
    n = len(subject.built.train_data())
    tests = subject.built.query_sets["paper"]
    queries = make_spec(Queries, items=tuple(Query(test=test) for test in tests))
    curvature = CurvatureOptions(damping=LISSA_DAMPING)
    rankings = Rankings(trained, queries, curvature, root="", seed=0, say=say)
    stability = make_spec(
        StabilitySpec,
        task=subject.task,
        methods=rankings.after_trainings(METHODS, retrainings=5, ensemble=1),
    )
    ranked = [rankings.of(word) for word in (*METHODS, "random")]
    ablation = ablation_of(
        trained,
        ranked,
        sizes=[k for k in (QUICK_SIZES if quick else SIZES) if k < n],
        modes=("relabel", "remove"),
        relabel="report",
        seeds=1,
    )
    scores = [ranked[0].scores[0], ranked[1].scores[0]]
    return make_spec(
        PaperSpec, task=subject.task, parts=(trained.train, *scores, stability, ablation)
    )


def _section_4_2(subject: "Subject", say: Say, *, given: bool, quick: bool) -> PaperSpec:
    """Section 4.2: two test images, their points by attribution and the whole by influence.

    Norms are recorded during training. At a checkpoint that the user named they are replayed,
    unless its training recorded them.
    """
    from influence_jobs.requests.rankings import (
        attribution_of,
        changed,
        influence_of,
        replayed_norms,
        trained_at,
        trained_of,
    )
    from influence_jobs.tasks.layers import weight_layers

    numbered = weight_layers(subject.built, subject.built.model())
    count = len(numbered)
    # The research report settles on the last layer but one; the others are for comparison.
    layers = tuple(numbered[i - 1] for i in (count // 3, 2 * count // 3, count - 1, count))
    norms: NormsSpec
    checkpoint = subject.checkpoints[0]
    # The published limit is for norms summed over a training; replayed norms have another scale.
    limits: tuple[float, ...] = (_published(subject.task.name).norm_limit,)
    if not given:
        plain = trained_of(subject, given=False, methods=()).train
        train = changed(plain, norm_layers=layers, norm_skip_epochs=int(plain.epochs > 1))
        subject, norms = trained_at(subject, train)
    elif isinstance(checkpoint, TrainedCheckpoint) and {*layers} <= {*checkpoint.train.norm_layers}:
        norms = checkpoint.train
    else:
        norms, limits = replayed_norms(subject, layers, seed=0), ()
    tests = tuple(range(min(2, len(subject.built.test_data()))))
    points = make_spec(Queries, items=tuple(_points(subject, tests)))
    images = make_spec(Queries, items=tuple(Query(test=test) for test in tests))
    settled = (numbered[count - 2],)
    attributions = [
        attribution_of(subject, norms, points, settled),
        *(
            attribution_of(subject, norms, points, settled, exclude_norm_above=limit)
            for limit in limits
        ),
        attribution_of(subject, norms, points, settled, normalize=True),
        *(
            attribution_of(subject, norms, points, (layer,), normalize=True)
            for layer in layers
            if layer not in settled
        ),
    ]
    samples = QUICK_CURVATURE_SAMPLES if quick else CURVATURE_SAMPLES
    curvature = CurvatureOptions(solver="ek-fac", curvature_samples=samples)
    influence = influence_of(subject, images, curvature, say, seed=0)
    return make_spec(PaperSpec, task=subject.task, parts=(norms, *attributions, influence))


def _points(subject: "Subject", tests: tuple[int, ...]) -> list[Query]:
    """Two points of each test image, at 1/3 and 2/3 of its height and width."""
    found = []
    for test in tests:
        height, width = subject.built.test_size(test) or (1, 1)
        for third in (1, 2):
            region = (third * height // 3, third * width // 3, 1, 1)
            found.append(Query(test=test, region=region))
    return found
