"""`infl submit paper`: which runs make up the report's experiments."""

from dataclasses import replace

from infl_cli.experiment_requests import (
    REPORT_SIZES,
    ablation_request,
    changed,
    influence_of,
    ranking_request,
    stability_rankings,
    trained_at,
    trained_request,
)
from infl_cli.options import QueriedData, Weights
from infl_cli.render import say
from infl_cli.requests import Subject, subject_request
from infl_cli.score_options import CurvatureOptions, QueryOptions
from infl_cli.score_requests import attribution_of, queries_request, replayed_norms
from influence_jobs.errors import SpecError
from influence_jobs.report import published
from influence_jobs.specs import (
    GradNormsSpec,
    PaperSpec,
    Queries,
    Query,
    StabilitySpec,
    TrainedCheckpoint,
    TrainSpec,
    make_spec,
)
from influence_jobs.tasks.layers import weight_layers

# The effective damping of the report's LiSSA: .01 x 25.
MNIST_CURVATURE = CurvatureOptions(damping=0.25)
QUICK_EPOCHS = {"mnist": 2, "ffdnet": 3, "ffdnet-grey": 3}
QUICK_SIZES = (1000, 5000)
QUICK_PATCHES, QUICK_CURVATURE_SAMPLES = 1000, "200"


def paper_request(weights: Weights, data: QueriedData, root: str, *, quick: bool) -> PaperSpec:
    """The runs of a section of the report.

    Raises:
        SpecError: The task is not one of the report's.
    """
    if quick and not weights.checkpoint:
        task = weights.task or "mnist"
        weights = replace(weights, epochs=weights.epochs or QUICK_EPOCHS.get(task))
        if task != "mnist":
            data = replace(data, limit=data.limit or QUICK_PATCHES)
    if weights.task not in (None, *QUICK_EPOCHS):
        raise _unknown(str(weights.task))
    subject = subject_request(weights, data, root, default_task="mnist", say=say)
    if subject.task.name not in QUICK_EPOCHS:
        raise _unknown(subject.task.name)
    given = bool(weights.checkpoint)
    if subject.task.name == "mnist":
        return _section_4_1(subject, given=given, quick=quick)
    return _section_4_2(subject, given=given, quick=quick)


def _unknown(task: str) -> SpecError:
    return SpecError(
        f"the report has no experiments with task {task}: choose mnist or ffdnet, or run "
        "infl submit stability, ablation or lds"
    )


def _section_4_1(subject: Subject, *, given: bool, quick: bool) -> PaperSpec:
    """Top samples of the output nodes and of ten test images, stability over seeds, ablation."""
    trained = trained_request(subject, given=given, methods=())
    if not given:
        # Those of the last layer too: figure 4.1 is of its nodes.
        layers = weight_layers(subject.built, subject.built.model())
        skipped = int(trained.train.epochs > 1)
        train = changed(trained.train, norm_layers=layers, norm_skip_epochs=skipped)
        trained = trained_at(subject, train)
    subject = trained.subject
    n = len(subject.built.train_data())
    queries = queries_request(QueryOptions(test_set="paper"), subject.built, seed=0)
    methods = ("attribution", "helpful", "harmful")
    stability = make_spec(
        StabilitySpec,
        task=subject.task,
        methods=stability_rankings(
            methods, trained, queries, MNIST_CURVATURE, retrainings=5, ensemble=1, seed=0
        ),
    )
    rankings = [
        ranking_request(word, trained, queries, MNIST_CURVATURE, root="", seed=0)
        for word in (*methods, "random")
    ]
    ablation = ablation_request(
        trained,
        rankings,
        sizes=[k for k in (QUICK_SIZES if quick else REPORT_SIZES) if k < n],
        modes=("relabel", "remove"),
        relabel="report",
        seeds=1,
    )
    scores = [rankings[0].scores[0], rankings[1].scores[0]]
    return make_spec(
        PaperSpec, task=subject.task, parts=(trained.train, *scores, stability, ablation)
    )


def _section_4_2(subject: Subject, *, given: bool, quick: bool) -> PaperSpec:
    """Points of two test images by attribution and its modifications, whole images by influence, the norms.

    Norms are recorded in training; of a checkpoint that the user named they are replayed, unless its training has them.
    """
    numbered = weight_layers(subject.built, subject.built.model())
    count = len(numbered)
    # The one before the last, on which the report settled, and others to compare with.
    layers = tuple(numbered[i - 1] for i in (count // 3, 2 * count // 3, count - 1, count))
    norms: TrainSpec | GradNormsSpec
    checkpoint = subject.checkpoints[0]
    if not given:
        plain = trained_request(subject, given=False, methods=()).train
        train = changed(plain, norm_layers=layers, norm_skip_epochs=int(plain.epochs > 1))
        subject, norms = trained_at(subject, train)
    elif isinstance(checkpoint, TrainedCheckpoint) and {*layers} <= {*checkpoint.train.norm_layers}:
        norms = checkpoint.train
    else:
        norms = replayed_norms(subject, layers, seed=0)
    tests = tuple(range(min(2, len(subject.built.test_data()))))
    points = make_spec(Queries, items=tuple(_points(subject, tests)))
    images = make_spec(Queries, items=tuple(Query(test=test) for test in tests))
    settled = (numbered[count - 2],)
    # The report's limit is of norms summed over a training; a replay's are of another size.
    limits = (published.NORM_LIMIT,) if isinstance(norms, TrainSpec) else ()
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
    curvature = CurvatureOptions(
        solver="ek-fac", curvature_samples=QUICK_CURVATURE_SAMPLES if quick else "2000"
    )
    influence = influence_of(subject, images, curvature, seed=0)
    return make_spec(PaperSpec, task=subject.task, parts=(norms, *attributions, influence))


def _points(subject: Subject, tests: tuple[int, ...]) -> list[Query]:
    """Two points of each test image, a third from either corner."""
    found = []
    for test in tests:
        height, width = subject.built.test_size(test) or (1, 1)
        for part in (1, 2):
            found.append(Query(test=test, region=(part * height // 3, part * width // 3, 1, 1)))
    return found
