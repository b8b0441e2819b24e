"""From the methods of `--by` to rankings of the training samples, of one or more trainings."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from influence_jobs.errors import SpecError
from influence_jobs.gradients.weights import weight_named, weights_of
from influence_jobs.jobs.queries import require_comparable, require_queries
from influence_jobs.kinds.attribution.spec import AttributionSpec
from influence_jobs.kinds.baseline.spec import METHODS as BASELINES
from influence_jobs.kinds.baseline.spec import BaselineSpec
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.train.spec import FileCheckpoint, TrainedCheckpoint, TrainSpec
from influence_jobs.requests.base import Say
from influence_jobs.requests.experiments import INFLUENCE, METHODS
from influence_jobs.requests.options import CurvatureOptions, WeightsRequest
from influence_jobs.requests.score_files import scores_of_file
from influence_jobs.requests.solving import s_tests_of, without_bfloat16
from influence_jobs.requests.subject import Subject, training_of
from influence_jobs.specs.base import make_spec
from influence_jobs.specs.norms import NormsSpec
from influence_jobs.specs.queries import Queries
from influence_jobs.specs.rankings import Ranking
from influence_jobs.specs.scores import ScoresSpec
from influence_jobs.store.find import find_run
from influence_jobs.store.scores_file import is_scores_file
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.layers import weight_layers
from influence_jobs.terms import JobPrecision

# Methods by the gradients of sample and query, and what `InfluenceSpec.relative` says of each.
GRADIENTS_ALONE: Mapping[str, Literal["theta"] | None] = {"dot-product": None, "cosine": "theta"}


def depends_on_training(method: str) -> bool:
    """Whether a method's scores change with the training."""
    return method not in BASELINES or BASELINES[method].of_weights


class Trained(NamedTuple):
    """What scores are of, and how variants are trained.

    Attributes:
        subject: With one checkpoint.
        train: The training that left it, with the norms that attribution needs; of a checkpoint
            in a file the task's own.
    """

    subject: Subject
    train: TrainSpec


def trained_of(
    subject: Subject,
    *,
    given: bool,
    methods: Collection[str],
    recipe: TrainSpec | None = None,
) -> Trained:
    """The training that scores and retrainings are of.

    Args:
        subject: With one checkpoint.
        given: Whether the user named the checkpoint; else it records norms if a method needs them
            (Algorithm 1).
        methods: What will be looked at.
        recipe: How models are retrained if the checkpoint does not say it.

    Raises:
        SpecError: The checkpoint does not say it, nor a recipe, or is not the end of its training.
    """
    if len(subject.checkpoints) != 1:
        raise SpecError("an experiment needs exactly one checkpoint: name one with --checkpoint")
    checkpoint = subject.checkpoints[0]
    if isinstance(checkpoint, FileCheckpoint) or not checkpoint.repeatable:
        if recipe is None:
            raise SpecError(
                f"it is not known how {checkpoint.words()} was trained: name a train run with "
                "--checkpoint, or leave --checkpoint out"
            )
        return Trained(subject, recipe)
    train = checkpoint.train
    if checkpoint.epoch != train.epochs:
        raise SpecError(
            f"models are retrained for {train.epochs} epochs, as {train.run_id} was, so scores are "
            f"needed after the last one: leave @{checkpoint.epoch} out, or train for "
            f"{checkpoint.epoch} epochs"
        )
    if given or "attribution" not in methods or train.epochs == 1:
        return Trained(subject, train)
    return trained_at(subject, changed(train, norm_layers=hidden_layers(subject.built)))


def recipe_for_file(subject: Subject, request: WeightsRequest, say: Say) -> TrainSpec | None:
    """How models are retrained if scores are of weights from elsewhere; else None.

    It is the training that `infl submit train` would make of the task.

    Raises:
        SpecError: No such preset.
    """
    foreign = [c for c in subject.checkpoints if not c.repeatable]
    if not foreign:
        return None
    train = training_of(
        subject.task, preset=request.preset, given={"epochs": request.epochs}, say=say
    )
    change = "" if train.trainer == "task" else "; --epochs and --preset change it"
    first = foreign[0]
    name = Path(first.path).name if isinstance(first, FileCheckpoint) else first.words()
    say(
        f"it is not known how {name} was trained: scores are of its weights, and models are "
        f"retrained as infl submit train --task {subject.task.name} does ({train.how()}{change})"
    )
    return train


def hidden_layers(task: Task) -> tuple[str, ...]:
    """The layers that attribution uses: all trained weight layers except the last.

    Raises:
        SpecError: There is no such layer.
    """
    model = task.model()
    found = tuple(
        layer
        for layer in weight_layers(task, model)[:-1]
        if layer
        and weights_of(model, layer) == [layer]
        and model.get_parameter(weight_named(model, layer).parameter).requires_grad
    )
    if not found:
        raise SpecError(
            f"attribution needs a trained layer before the last one, and {type(task).__name__} has "
            "none: name layers with --layer, or leave it out of --by"
        )
    return found


def of_seed(trained: Trained, seed: int) -> Trained:
    """The same training from a seed; from its own it is what it is, also where that is a file."""
    if seed == trained.train.seed:
        return trained
    return trained_at(trained.subject, changed(trained.train, seed=seed))


def trained_at(subject: Subject, train: TrainSpec) -> Trained:
    """A subject at the last epoch of another training."""
    checkpoint = TrainedCheckpoint(train=train, epoch=train.epochs)
    return Trained(subject._replace(checkpoints=(checkpoint,)), train)


def changed(train: TrainSpec, **values: Any) -> TrainSpec:
    """A training with some fields replaced."""
    kept = {n: getattr(train, n) for n in TrainSpec.model_fields if n != "kind"}
    return make_spec(TrainSpec, **{**kept, **values})


class Rankings:
    """Makes rankings of the training samples for one set of queries.

    Args:
        trained: The training.
        queries: The queries.
        curvature: The curvature options of influence.
        root: Folder of all runs; named runs are looked up there.
        seed: Seed of random scores and of the samples' noise.
        say: Takes lines for the user.
    """

    def __init__(
        self,
        trained: Trained,
        queries: Queries,
        curvature: CurvatureOptions,
        *,
        root: str,
        seed: int,
        say: Say,
    ):
        self._trained, self._queries, self._curvature = trained, queries, curvature
        self._root, self._seed, self._say = root, seed, say

    def of(self, word: str, *, ensemble: int = 1) -> Ranking:
        """The ranking by a method's name, by runs with scores, or by a file of scores.

        Of runs: RUN, RUN+RUN (their mean), NAME=RUN; of a file: FILE, NAME=FILE.

        The largest scores come first. If the name is `harmful`, the smallest do.

        Args:
            ensemble: Number of seeds whose scores are averaged, if the method depends on the
                training.

        Raises:
            SpecError: There is no such method, or the file does not hold scores.
            StoreError: There is no such run.
        """
        if word not in METHODS:
            return self._of_runs(word)
        if ensemble == 1 or not depends_on_training(word):
            return self._over(word, [self._trained])
        first = self._trained.train.seed
        return self._over(word, [of_seed(self._trained, first + i) for i in range(ensemble)])

    def after_trainings(
        self, words: Sequence[str], *, retrainings: int, ensemble: int
    ) -> tuple[tuple[Ranking, ...], ...]:
        """For each method, one ranking of the training and one of each retraining.

        Each ranking is the mean over `ensemble` seeds. The first takes the training's seed and the
        seeds after it, the next one the seeds that follow.

        Raises:
            SpecError: There is no such method, or it does not depend on the training.
        """
        possible = [word for word in METHODS if depends_on_training(word)]
        for word in words:
            if word not in possible:
                raise SpecError(
                    f"stability cannot test {word!r}: choose a method whose scores depend on the "
                    f"training, {', '.join(possible)}"
                )
        first = self._trained.train.seed
        seeds = range(first, first + ensemble * (retrainings + 1))
        by_seed = [of_seed(self._trained, seed) for seed in seeds]
        require_queries(self._trained.subject.built, self._queries)
        return tuple(
            tuple(
                self._over(word, by_seed[i : i + ensemble])
                for i in range(0, len(by_seed), ensemble)
            )
            for word in words
        )

    def _over(self, word: str, trainings: Sequence[Trained]) -> Ranking:
        """A method's ranking by the mean of its scores over some trainings."""
        return make_spec(
            Ranking,
            name=word if len(trainings) == 1 else f"{word} x{len(trainings)}",
            scores=tuple(self._scores(word, one) for one in trainings),
            largest=word != "harmful",
        )

    def _of_runs(self, word: str) -> Ranking:
        name, _, runs = word.rpartition("=")
        if is_scores_file(runs):
            subject = self._trained.subject
            given = scores_of_file(runs, subject.task, subject.built, self._queries)
            name = name or Path(runs).stem
            return make_spec(Ranking, name=name, scores=(given,), largest=name != "harmful")
        misspelt = difflib.get_close_matches(runs, METHODS, 1, cutoff=0.8)
        if "-" not in runs or misspelt:
            raise SpecError(
                f"unknown method {word!r}: choose {', '.join(METHODS)}, a run with scores, or a "
                "file of them (.npy, .parquet, .zarr)"
            )
        specs = tuple(scores_named(self._root, run) for run in runs.split("+"))
        return make_spec(Ranking, name=name or runs, scores=specs, largest=name != "harmful")

    def _scores(self, method: str, trained: Trained) -> ScoresSpec:
        """A method's scores, as `infl submit influence | attribution | baseline` makes them.

        Attribution takes the norms recorded in training, or replays them if there are none.
        """
        subject, queries = trained.subject, self._queries
        if method in GRADIENTS_ALONE:
            return gradients_alone(method, subject, queries, self._say, seed=self._seed)
        if method in INFLUENCE:
            return influence_of(subject, queries, self._curvature, self._say, seed=self._seed)
        if method == "attribution":
            layers = hidden_layers(subject.built)
            norms: NormsSpec = trained.train
            if not set(layers) <= set(trained.train.norm_layers):
                norms = replayed_norms(subject, layers, seed=queries.seed)
            return attribution_of(subject, norms, queries, layers)
        if method == "nearest":
            require_comparable(subject.built, queries)
        return make_spec(
            BaselineSpec,
            task=subject.task,
            method=method,
            queries=queries,
            checkpoint=subject.checkpoints[0],
            seed=self._seed,
        )


def scores_named(root: str, word: str) -> ScoresSpec:
    """The spec of a run with scores.

    Raises:
        StoreError: There is no such run.
        SpecError: The run has no scores.
    """
    spec = find_run(root, word).spec
    if not isinstance(spec, ScoresSpec):
        raise SpecError(
            f"{spec.run_id} has no scores: name a run that has, such as an influence, attribution "
            "or baseline run"
        )
    return spec


def gradients_alone(
    method: str,
    subject: Subject,
    queries: Queries,
    say: Say,
    *,
    seed: int,
    precision: JobPrecision | None = None,
) -> InfluenceSpec:
    """The spec of a method of `GRADIENTS_ALONE`: influence without curvature.

    The cosine lacks the norm of the query's gradient, which changes no order of samples.
    """
    identity = CurvatureOptions(solver="identity", precision=precision)
    relative = GRADIENTS_ALONE[method]
    return influence_of(subject, queries, identity, say, seed=seed, relative=relative)


def influence_of(
    subject: Subject,
    queries: Queries,
    curvature: CurvatureOptions,
    say: Say,
    *,
    seed: int,
    relative: Literal["theta", "loss"] | None = None,
) -> InfluenceSpec:
    """The spec of influence through all layers."""
    asked, sample_precision = without_bfloat16(curvature)
    return make_spec(
        InfluenceSpec,
        task=subject.task,
        s_tests=s_tests_of(asked, subject, queries, say, seed=seed),
        relative=relative,
        sample_precision=sample_precision,
        noise_draws=queries.noise_draws,
        seed=seed,
    )


def replayed_norms(subject: Subject, layers: tuple[str, ...], *, seed: int) -> GradNormsSpec:
    """The spec of a replay of some layers' norms at the subject's checkpoints."""
    return make_spec(
        GradNormsSpec,
        task=subject.task,
        checkpoints=subject.checkpoints,
        layers=layers,
        seed=seed,
    )


def attribution_of(
    subject: Subject,
    norms: NormsSpec,
    queries: Queries,
    layers: tuple[str, ...],
    **fields: Any,
) -> AttributionSpec:
    """The spec of attribution by the norms of some layers."""
    return make_spec(
        AttributionSpec,
        task=subject.task,
        norms=norms,
        checkpoint=subject.checkpoints[0],
        layers=layers,
        queries=queries,
        **fields,
    )
