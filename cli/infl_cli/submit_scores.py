"""`infl submit s-test | influence | attribution | baseline`: from outputs to the samples they came from."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from infl_cli import options as o
from infl_cli.grouped import grouped
from infl_cli.how import ShardedHow
from infl_cli.render import say
from infl_cli.score_options import CurvatureOptions, QueryOptions
from influence_jobs.errors import SpecError
from influence_jobs.store.folder import runs_folder

if TYPE_CHECKING:
    from influence_jobs.specs import Checkpoint

app = typer.Typer()

_SCORES = "Scores"

Modules = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        help="Layers whose parameters count: number, module name, or all weight layers as all. May be "
        "repeated; by default every parameter of the model.",
        rich_help_panel="What to compute",
    ),
]
KeepLayers = Annotated[
    bool,
    typer.Option(
        "--keep-layers", help="Keep each layer's part of the scores too.", rich_help_panel=_SCORES
    ),
]


@app.command("s-test")
@grouped
def s_test(
    weights: o.Weights,
    queries: QueryOptions,
    curvature: CurvatureOptions,
    data: o.QueriedData,
    how: ShardedHow,
    layer: Modules = None,
    seed: o.Seed = 0,
    runs: o.Runs = o.DEFAULT_RUNS,
) -> None:
    """s_test vectors: the gradients of chosen outputs with the curvature of the training loss divided out."""
    from infl_cli.launch import carry_out
    from infl_cli.requests import subject_request
    from infl_cli.score_requests import queries_request, s_test_requests
    from influence_jobs.store.run import Run

    root = runs_folder(runs)
    subject = subject_request(weights, data, root, default_task="mnist", say=say)
    asked = queries_request(queries, subject.built, seed=seed)
    specs = s_test_requests(subject, asked, curvature, layers=layer, seed=seed)
    for spec in specs:
        carry_out(Run(root, spec), how)


@app.command()
@grouped
def influence(
    weights: o.Weights,
    queries: QueryOptions,
    curvature: CurvatureOptions,
    data: o.QueriedData,
    how: ShardedHow,
    s_test: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN",
            help="s-test run whose vectors are used, instead of what to explain and how. May be repeated.",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    combine: Annotated[
        Literal["sum", "mean"],
        typer.Option(
            help="Over several checkpoints, sum (TracIn); over several seeds, mean (ensemble).",
            rich_help_panel=_SCORES,
        ),
    ] = "sum",
    relative: Annotated[
        Literal["theta", "loss"] | None,
        typer.Option(
            help="Divide by each sample's effect on the parameters (theta) or on the training losses (RelatIF).",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    keep_layers: KeepLayers = False,
    layer: Modules = None,
    seed: o.Seed = 0,
    runs: o.Runs = o.DEFAULT_RUNS,
) -> None:
    """Influence of every training sample on chosen outputs: positive = helpful, negative = harmful."""
    from infl_cli.launch import carry_out
    from infl_cli.requests import checkpoint_request, subject_request
    from infl_cli.score_requests import found_spec, queries_request, s_test_requests
    from influence_jobs.specs import InfluenceSpec, STestSpec, make_spec
    from influence_jobs.store.run import Run

    root = runs_folder(runs)
    if s_test:
        given = (queries, curvature, data, replace(weights, checkpoint=None), layer)
        if given != (QueryOptions(), CurvatureOptions(), o.QueriedData(), o.Weights(), None):
            raise SpecError(
                "--s-test RUN says what is explained, how and of which task: leave those options out"
            )
        specs = tuple(found_spec(root, word, STestSpec, "s-test run") for word in s_test)
        for word in weights.checkpoint or ():
            for checkpoint in checkpoint_request(word, root):
                if all(checkpoint.identity() != spec.checkpoint.identity() for spec in specs):
                    raise SpecError(
                        f"{specs[0].run_id} is of another checkpoint than {word}: scores need the s_test "
                        "vectors of their own checkpoint, leave --checkpoint out"
                    )
    else:
        subject = subject_request(weights, data, root, default_task="mnist", say=say)
        asked = queries_request(queries, subject.built, seed=seed)
        specs = s_test_requests(subject, asked, curvature, layers=layer, seed=seed)
    spec = make_spec(
        InfluenceSpec,
        task=specs[0].task,
        s_tests=specs,
        combine=combine,
        relative=relative,
        keep_modules=keep_layers,
        noise_draws=specs[0].queries.noise_draws,
        seed=seed,
    )
    carry_out(Run(root, spec), how)


@app.command()
@grouped
def attribution(
    weights: o.Weights,
    queries: QueryOptions,
    data: o.QueriedData,
    how: ShardedHow,
    norms: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="grad-norms run, or train run with recorded norms, whose norms are used; by default a "
            "replay at the checkpoint.",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    exclude_norm_above: Annotated[
        float | None,
        typer.Option(help="Leave out samples whose norms sum to more.", rich_help_panel=_SCORES),
    ] = None,
    normalize: Annotated[
        bool,
        typer.Option(
            "--normalize", help="Divide each sample's norms by their sum.", rich_help_panel=_SCORES
        ),
    ] = False,
    keep_layers: KeepLayers = False,
    layer: o.Layers = None,
    seed: o.Seed = 0,
    runs: o.Runs = o.DEFAULT_RUNS,
) -> None:
    """Attribution: activations of chosen outputs times the training samples' gradient norms.

    By default over all hidden layers, that is all weight layers but the last.
    """
    from infl_cli.launch import carry_out
    from infl_cli.requests import subject_request
    from infl_cli.score_requests import attribution_of, queries_request, replayed_norms
    from influence_jobs.specs import (
        GradNormsSpec,
        TrainedCheckpoint,
        TrainSpec,
    )
    from influence_jobs.store.find import find_run
    from influence_jobs.store.run import Run
    from influence_jobs.tasks.layers import resolve_layers, weight_layers

    root = runs_folder(runs)
    source = find_run(root, norms).spec if norms else None
    if isinstance(source, GradNormsSpec):
        at, layers = _last(source.checkpoints), source.layers
    elif isinstance(source, TrainSpec):
        at, layers = (TrainedCheckpoint(train=source, epoch=source.epochs),), source.norm_layers
    elif source is None:
        at, layers = (), ()
    else:
        raise SpecError(f"{source.run_id} has no gradient norms: name a grad-norms or train run")
    if source is not None and not layers:
        raise SpecError(f"{source.run_id} recorded no gradient norms: leave --norms out")
    subject = subject_request(
        weights, data, root, default_task="mnist", say=say, default_checkpoints=at
    )
    _refuse_quantity(queries)
    if len(subject.checkpoints) != 1:
        raise SpecError("activations are those of one checkpoint: name one with --checkpoint")
    asked = queries_request(queries, subject.built, seed=seed)
    if layer:
        layers = resolve_layers(layer, subject.built)
    elif source is None:
        layers = tuple(weight_layers(subject.built, subject.built.model())[:-1])
    spec = attribution_of(
        subject,
        source or replayed_norms(subject, layers, seed=seed),
        asked,
        layers,
        exclude_norm_above=exclude_norm_above,
        normalize=normalize,
        keep_layers=keep_layers,
    )
    carry_out(Run(root, spec), how)


@app.command()
@grouped
def baseline(
    weights: o.Weights,
    queries: QueryOptions,
    data: o.QueriedData,
    how: ShardedHow,
    method: Annotated[
        Literal["random", "loss", "dot-product", "nearest"],
        typer.Option(
            help="random numbers; the sample's own training loss; dot product of the gradients (identity "
            "Hessian); minus the distance of the pixels.",
            rich_help_panel=_SCORES,
        ),
    ],
    seed: o.Seed = 0,
    runs: o.Runs = o.DEFAULT_RUNS,
) -> None:
    """Scores that know less, in the same form: what a method must beat."""
    from infl_cli.launch import carry_out
    from infl_cli.requests import subject_request
    from infl_cli.score_requests import queries_request, s_test_requests
    from influence_jobs.specs import BaselineSpec, InfluenceSpec, make_spec
    from influence_jobs.store.run import Run

    root = runs_folder(runs)
    subject = subject_request(weights, data, root, default_task="mnist", say=say)
    asked = queries_request(queries, subject.built, seed=seed)
    if method != "dot-product":
        _refuse_quantity(queries)
    if method == "dot-product":
        identity = CurvatureOptions(solver="identity")
        s_tests = s_test_requests(subject, asked, identity, layers=None, seed=seed)
        spec: BaselineSpec | InfluenceSpec = make_spec(
            InfluenceSpec,
            task=subject.task,
            s_tests=s_tests,
            noise_draws=asked.noise_draws,
            seed=seed,
        )
    else:
        spec = make_spec(
            BaselineSpec,
            task=subject.task,
            method=method,
            queries=asked,
            checkpoint=subject.checkpoints[0],
            seed=seed,
        )
    carry_out(Run(root, spec), how)


def _refuse_quantity(queries: QueryOptions) -> None:
    if queries.quantity != QueryOptions().quantity:
        raise SpecError("--quantity is what influence explains: leave it out")


def _last(checkpoints: "Sequence[Checkpoint]") -> "tuple[Checkpoint, ...]":
    """The last epoch of a training; the order in which a sum names checkpoints is none."""
    from influence_jobs.specs import TrainedCheckpoint

    trained = [c for c in checkpoints if isinstance(c, TrainedCheckpoint)]
    if len(checkpoints) == 1:
        return tuple(checkpoints)
    if len(trained) < len(checkpoints) or len({c.train.run_id for c in trained}) > 1:
        raise SpecError("the norms are of several trainings: name one with --checkpoint")
    return (max(trained, key=lambda checkpoint: checkpoint.epoch),)
