"""`infl submit paper`: which runs make up the report's experiments."""

from dataclasses import replace

from infl_cli.experiment_requests import (
    REPORT_SIZES,
    Trained,
    ablation_request,
    attribution_request,
    changed,
    ranking_request,
    scores_request,
    stability_rankings,
    trained_at,
    trained_request,
)
from infl_cli.options import QueriedData, Weights
from infl_cli.render import say
from infl_cli.requests import subject_request
from infl_cli.score_options import CurvatureOptions, QueryOptions
from infl_cli.score_requests import queries_request
from influence_jobs.errors import SpecError
from influence_jobs.specs import (
    PaperSpec,
    Queries,
    Query,
    StabilitySpec,
    make_spec,
)
from influence_jobs.tasks.layers import weight_layers

# The effective damping of the report's LiSSA: .01 x 25.
MNIST_CURVATURE = CurvatureOptions(damping=0.25)
QUICK_EPOCHS = {"mnist": 2, "ffdnet": 3, "ffdnet-grey": 3}
QUICK_SIZES = (1000, 5000)
QUICK_PATCHES, QUICK_CURVATURE_SAMPLES = 1000, "200"
NORM_LIMIT = 5.0  # section 4.2.2


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
    trained = trained_request(subject, given=given, methods=("attribution",))
    if subject.task.name == "mnist":
        return _section_4_1(trained, quick=quick)
    return _section_4_2(trained, quick=quick, given=given)


def _unknown(task: str) -> SpecError:
    return SpecError(
        f"the report has no experiments with task {task}: choose mnist or ffdnet, or run "
        "infl submit stability, ablation or lds"
    )


def _section_4_1(trained: Trained, *, quick: bool) -> PaperSpec:
    """Top samples of ten test images, stability over seeds, ablation."""
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
    return make_spec(PaperSpec, task=subject.task, parts=(*scores, stability, ablation))


def _section_4_2(trained: Trained, *, quick: bool, given: bool) -> PaperSpec:
    """Points of two test images by attribution and its modifications, whole images by influence, the norms."""
    subject = trained.subject
    numbered = weight_layers(subject.built, subject.built.model())
    count = len(numbered)
    # The one before the last, on which the report settled, and others to compare with.
    layers = tuple(numbered[i - 1] for i in (count // 3, 2 * count // 3, count - 1, count))
    if given:
        if missing := [layer for layer in layers if layer not in trained.train.norm_layers]:
            raise SpecError(
                f"{trained.train.run_id} has no norms of layer {missing[0]}: leave --checkpoint out"
            )
    else:
        train = changed(
            trained.train, norm_layers=layers, norm_skip_epochs=int(trained.train.epochs > 1)
        )
        trained = trained_at(subject, train)
    tests = tuple(range(min(2, len(subject.built.test_data()))))
    points = make_spec(Queries, items=tuple(_points(trained, tests)))
    images = make_spec(Queries, items=tuple(Query(test=test) for test in tests))
    settled = (numbered[count - 2],)
    attributions = [
        attribution_request(trained, points, settled),
        attribution_request(trained, points, settled, exclude_norm_above=NORM_LIMIT),
        attribution_request(trained, points, settled, normalize=True),
        *(
            attribution_request(trained, points, (layer,), normalize=True)
            for layer in layers
            if layer not in settled
        ),
    ]
    curvature = CurvatureOptions(
        solver="ek-fac", curvature_samples=QUICK_CURVATURE_SAMPLES if quick else "2000"
    )
    influence = scores_request("helpful", trained, images, curvature, seed=0)
    return make_spec(PaperSpec, task=subject.task, parts=(trained.train, *attributions, influence))


def _points(trained: Trained, tests: tuple[int, ...]) -> list[Query]:
    """Two points of each test image, a third from either corner."""
    found = []
    for test in tests:
        height, width = trained.subject.built.test_size(test) or (1, 1)
        for part in (1, 2):
            found.append(Query(test=test, region=(part * height // 3, part * width // 3, 1, 1)))
    return found
