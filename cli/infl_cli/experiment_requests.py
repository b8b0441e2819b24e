"""From what the user typed to specs of experiments."""

from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from infl_cli.requests import Subject
from infl_cli.score_options import CurvatureOptions
from infl_cli.score_requests import attribution_of, replayed_norms, s_test_requests
from influence_jobs.errors import SpecError
from influence_jobs.jobs.ablation import require_ablation
from influence_jobs.jobs.queries import require_queries
from influence_jobs.specs import (
    AblationSpec,
    AnyScores,
    BaselineSpec,
    GradNormsSpec,
    InfluenceSpec,
    Queries,
    Ranking,
    RelabelRule,
    ScoresSpec,
    TrainedCheckpoint,
    TrainSpec,
    make_spec,
)
from influence_jobs.store.find import find_run
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.layers import weight_layers

METHODS = ("attribution", "helpful", "harmful", "random", "loss", "nearest", "dot-product")
REPORT_SIZES = (200, 500, 1000, 2000, 5000, 10_000)
SEEDED = ("attribution", "helpful", "harmful", "loss", "dot-product")  # that depend on a training


class Trained(NamedTuple):
    """What scores are of: a subject with one training, which has the norms that attribution needs."""

    subject: Subject
    train: TrainSpec


def require_used(curvature: CurvatureOptions, methods: Collection[str]) -> None:
    """Refuse options of the curvature where no method has one.

    Args:
        curvature: What the user asked for.
        methods: Words that rankings were made of, which refuses those that are misspelt.

    Raises:
        SpecError: Naming the first option.
    """
    if {"helpful", "harmful"} & {*methods}:
        return
    for field in fields(curvature):
        if getattr(curvature, field.name) != field.default:
            option = f"--{field.name.replace('_', '-')}"
            raise SpecError(f"{option} has no meaning for --by {', '.join(methods)}: leave it out")


def trained_request(subject: Subject, *, given: bool, methods: Collection[str]) -> Trained:
    """The training that scores and retrainings are of.

    Args:
        subject: With one checkpoint.
        given: Whether the user named the checkpoint; else it records norms if a method needs them (Algorithm 1).
        methods: What will be looked at.

    Raises:
        SpecError: The checkpoint is a file, which does not say how to train, or not the end of its training.
    """
    if len(subject.checkpoints) != 1:
        raise SpecError("experiments are of one checkpoint: name one with --checkpoint")
    checkpoint = subject.checkpoints[0]
    if not isinstance(checkpoint, TrainedCheckpoint):
        raise SpecError(
            "a file of weights does not say how it was trained: name a train run with --checkpoint, or leave it out"
        )
    train = checkpoint.train
    if checkpoint.epoch != train.epochs:
        raise SpecError(
            f"retrainings end after epoch {train.epochs}, as {train.run_id} does, and scores must be of the same: "
            f"leave @{checkpoint.epoch} out, or train for {checkpoint.epoch} epochs"
        )
    if given or "attribution" not in methods or train.epochs == 1:
        return Trained(subject, train)
    return trained_at(subject, changed(train, norm_layers=hidden_layers(subject.built)))


def hidden_layers(task: Task) -> tuple[str, ...]:
    """The layers whose activations attribution looks at: all trained weight layers but the last.

    Raises:
        SpecError: There is none.
    """
    model = task.model()
    modules = dict(model.named_modules())
    found = tuple(
        layer
        for layer in weight_layers(task, model)[:-1]
        if all(p.requires_grad for p in modules[layer].parameters())
    )
    if not found:
        raise SpecError("attribution needs a hidden layer that is trained: leave it out of --by")
    return found


def of_seed(trained: Trained, seed: int) -> Trained:
    """The same training from another seed."""
    return trained_at(trained.subject, changed(trained.train, seed=seed))


def trained_at(subject: Subject, train: TrainSpec) -> Trained:
    """A subject as another training leaves it."""
    checkpoint = TrainedCheckpoint(train=train, epoch=train.epochs)
    return Trained(subject._replace(checkpoints=(checkpoint,)), train)


def changed(train: TrainSpec, **values: Any) -> TrainSpec:
    """A training with some fields set otherwise."""
    kept = {n: getattr(train, n) for n in TrainSpec.model_fields if n != "kind"}
    return make_spec(TrainSpec, **{**kept, **values})


def ranking_request(
    word: str,
    trained: Trained,
    queries: Queries,
    curvature: CurvatureOptions,
    *,
    root: str,
    seed: int,
) -> Ranking:
    """A method by its name, or the scores of runs as RUN, RUN+RUN (their mean), or NAME=RUN.

    Of a run the largest scores come first, under the name `harmful` the smallest.

    Raises:
        SpecError: There is no such method.
        StoreError: There is no such run.
    """
    if word in METHODS:
        scores = scores_request(word, trained, queries, curvature, seed=seed)
        return make_spec(Ranking, name=word, scores=(scores,), largest=word != "harmful")
    name, _, runs = word.rpartition("=")
    if "-" not in runs:
        raise SpecError(
            f"unknown method {word!r}: choose {', '.join(METHODS)}, or the id of a run with scores"
        )
    specs = tuple(found_scores(root, part) for part in runs.split("+"))
    return make_spec(Ranking, name=name or runs, scores=specs, largest=name != "harmful")


def found_scores(root: str, word: str) -> AnyScores:
    """The spec of a run with scores.

    Raises:
        StoreError: There is no such run.
        SpecError: It has no scores.
    """
    spec = find_run(root, word).spec
    if not isinstance(spec, ScoresSpec):
        raise SpecError(
            f"{spec.run_id} has no scores: name an influence, attribution or baseline run"
        )
    return spec


def scores_request(
    method: str, trained: Trained, queries: Queries, curvature: CurvatureOptions, *, seed: int
) -> AnyScores:
    """The scores of a method, as `infl submit influence | attribution | baseline` would make them.

    Attribution takes the norms recorded in training where there are any, else a replay of them.
    """
    subject, task = trained.subject, trained.subject.task
    if method in ("helpful", "harmful", "dot-product"):
        chosen = CurvatureOptions(solver="identity") if method == "dot-product" else curvature
        return influence_of(subject, queries, chosen, seed=seed)
    if method == "attribution":
        layers = hidden_layers(subject.built)
        norms: TrainSpec | GradNormsSpec = trained.train
        if not set(layers) <= set(trained.train.norm_layers):
            norms = replayed_norms(subject, layers, seed=queries.seed)
        return attribution_of(subject, norms, queries, layers)
    return make_spec(
        BaselineSpec,
        task=task,
        method=method,
        queries=queries,
        checkpoint=subject.checkpoints[0],
        seed=seed,
    )


def influence_of(
    subject: Subject, queries: Queries, curvature: CurvatureOptions, *, seed: int
) -> InfluenceSpec:
    """Influence through all layers."""
    return make_spec(
        InfluenceSpec,
        task=subject.task,
        s_tests=s_test_requests(subject, queries, curvature, layers=None, seed=seed),
        noise_draws=queries.noise_draws,
        seed=seed,
    )


def stability_rankings(
    words: Sequence[str],
    trained: Trained,
    queries: Queries,
    curvature: CurvatureOptions,
    *,
    retrainings: int,
    ensemble: int,
    seed: int,
) -> tuple[tuple[Ranking, ...], ...]:
    """For each method its rankings from the training and from others, each the mean over `ensemble` seeds.

    The first is of seeds 0 to `ensemble` - 1 counted from the training's own, the next of those after them.

    Raises:
        SpecError: There is no such method, or it does not depend on the training.
    """
    for word in words:
        if word not in SEEDED:
            raise SpecError(
                f"stability of {word!r}: choose {', '.join(SEEDED)}, whose scores depend on the training"
            )
    first = trained.train.seed
    by_seed = [of_seed(trained, first + i) for i in range(ensemble * (retrainings + 1))]
    require_queries(trained.subject.built, queries)
    methods = []
    for word in words:
        scores = [scores_request(word, one, queries, curvature, seed=seed) for one in by_seed]
        groups = [scores[i : i + ensemble] for i in range(0, len(scores), ensemble)]
        methods.append(
            tuple(
                make_spec(
                    Ranking,
                    name=word if ensemble == 1 else f"{word} x{ensemble}",
                    scores=tuple(group),
                    largest=word != "harmful",
                )
                for group in groups
            )
        )
    return tuple(methods)


def ensemble_ranking(
    word: str,
    trained: Trained,
    queries: Queries,
    curvature: CurvatureOptions,
    *,
    root: str,
    seed: int,
    ensemble: int,
) -> Ranking:
    """Like `ranking_request`, of a method that depends on the training the mean over `ensemble` seeds."""
    if word not in SEEDED or ensemble == 1:
        return ranking_request(word, trained, queries, curvature, root=root, seed=seed)
    members = [of_seed(trained, trained.train.seed + i) for i in range(ensemble)]
    scores = [scores_request(word, one, queries, curvature, seed=seed) for one in members]
    return make_spec(
        Ranking, name=f"{word} x{ensemble}", scores=tuple(scores), largest=word != "harmful"
    )


def ablation_request(
    trained: Trained,
    rankings: Sequence[Ranking],
    *,
    sizes: Sequence[int] | None,
    modes: Sequence[str],
    relabel: RelabelRule,
    seeds: int,
) -> AblationSpec:
    """An ablation grid, refused at once if the task cannot have it.

    Args:
        sizes: The numbers k; by default the report's, as far as there are so many samples.
        seeds: How many, counted from the training's own.

    Raises:
        SpecError: As `require_ablation` says.
    """
    built = trained.subject.built
    n = len(built.train_data())
    if "relabel" not in modes and relabel != "report":
        raise SpecError("--relabel-to has no meaning for --mode remove: leave it out")
    sizes = sizes or [k for k in REPORT_SIZES if k < n]
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
