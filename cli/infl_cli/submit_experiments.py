"""`infl submit ablation | stability | lds | paper`: is a score right? Retrain, and look."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from infl_cli import options as o
from infl_cli.grouped import grouped
from infl_cli.how import RetrainingHow, WorkersHow
from infl_cli.render import say
from infl_cli.score_options import CurvatureOptions, QueryOptions
from influence_jobs.store.folder import runs_folder

if TYPE_CHECKING:
    from infl_cli.experiment_requests import Trained
    from influence_jobs.specs import Queries

app = typer.Typer()

_EXPERIMENT = "Experiment"

By = Annotated[
    list[str] | None,
    typer.Option(
        metavar="METHOD",
        help="attribution, helpful, harmful, random, loss, nearest, dot-product, or a run with scores "
        "(RUN+RUN: their mean; NAME=RUN: as tables shall call it). May be repeated.",
        rich_help_panel=_EXPERIMENT,
    ),
]
Seeds = Annotated[
    int,
    typer.Option(
        min=1,
        help="Trainings of each variant, each from another seed.",
        rich_help_panel=_EXPERIMENT,
    ),
]
Ensemble = Annotated[
    int,
    typer.Option(
        min=1,
        help="Scores are the mean over models trained from so many seeds.",
        rich_help_panel=_EXPERIMENT,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0, help="Seed of random scores and sample noise.", rich_help_panel=_EXPERIMENT
    ),
]
K = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        help="How many of the top samples are manipulated. May be repeated; by default the report's 200 to 10000.",
        rich_help_panel=_EXPERIMENT,
    ),
]
ABLATED = ("attribution", "helpful", "harmful", "random")
COMPARED = ("helpful", "dot-product", "attribution", "nearest", "loss", "random")
RETRAINED = ("attribution", "helpful", "harmful")


@app.command()
@grouped
def ablation(
    weights: o.Weights,
    queries: QueryOptions,
    curvature: CurvatureOptions,
    data: o.QueriedData,
    how: RetrainingHow,
    k: K = None,
    mode: Annotated[
        Literal["relabel", "remove", "both"],
        typer.Option(help="What is done to the samples.", rich_help_panel=_EXPERIMENT),
    ] = "both",
    by: By = None,
    relabel_to: Annotated[
        Literal["report", "next", "random"],
        typer.Option(
            help="report: class 0, or 1 for queries of class 0; next: own class + 1; random: another class.",
            rich_help_panel=_EXPERIMENT,
        ),
    ] = "report",
    seeds: Seeds = 1,
    seed: Seed = 0,
    runs: o.Runs = o.DEFAULT_RUNS,
) -> None:
    """Retrain without a query's top k samples, or with other labels on them: what becomes of the query?

    Every retrained model is kept: a larger grid trains only what is new.
    """
    from infl_cli.experiment_requests import ablation_request, ranking_request, require_used
    from infl_cli.launch import carry_out
    from influence_jobs.store.run import Run

    root = runs_folder(runs)
    methods = by or ABLATED
    trained, asked = _subject(weights, queries, data, root, methods, seed=seed)
    rankings = tuple(
        ranking_request(word, trained, asked, curvature, root=root, seed=seed) for word in methods
    )
    require_used(curvature, methods)
    modes = ("relabel", "remove") if mode == "both" else (mode,)
    spec = ablation_request(
        trained, rankings, sizes=k, modes=modes, relabel=relabel_to, seeds=seeds
    )
    carry_out(Run(root, spec), how)


@app.command()
@grouped
def stability(
    weights: o.Weights,
    queries: QueryOptions,
    curvature: CurvatureOptions,
    data: o.QueriedData,
    how: WorkersHow,
    by: By = None,
    retrainings: Annotated[
        int,
        typer.Option(min=1, help="Compared with the first training.", rich_help_panel=_EXPERIMENT),
    ] = 5,
    top: Annotated[
        int, typer.Option(min=1, help="Samples that are compared.", rich_help_panel=_EXPERIMENT)
    ] = 100,
    ensemble: Ensemble = 1,
    seed: Seed = 0,
    runs: o.Runs = o.DEFAULT_RUNS,
) -> None:
    """Train from other seeds: how many of a query's top samples are found again?"""
    from infl_cli.experiment_requests import require_used, stability_rankings
    from infl_cli.launch import carry_out
    from influence_jobs.specs import StabilitySpec, make_spec
    from influence_jobs.store.run import Run

    root = runs_folder(runs)
    words = by or RETRAINED
    trained, asked = _subject(weights, queries, data, root, words, seed=seed)
    methods = stability_rankings(
        words,
        trained,
        asked,
        curvature,
        retrainings=retrainings,
        ensemble=ensemble,
        seed=seed,
    )
    require_used(curvature, words)
    spec = make_spec(StabilitySpec, task=trained.subject.task, methods=methods, top=top)
    carry_out(Run(root, spec), how)


@app.command()
@grouped
def lds(
    weights: o.Weights,
    queries: QueryOptions,
    curvature: CurvatureOptions,
    data: o.QueriedData,
    how: RetrainingHow,
    by: By = None,
    subsets: Annotated[
        int, typer.Option(min=3, help="Random subsets.", rich_help_panel=_EXPERIMENT)
    ] = 100,
    fraction: Annotated[
        float,
        typer.Option(help="Of the training set in each subset.", rich_help_panel=_EXPERIMENT),
    ] = 0.5,
    seeds: Seeds = 1,
    ensemble: Ensemble = 1,
    seed: Seed = 0,
    runs: o.Runs = o.DEFAULT_RUNS,
) -> None:
    """Linear datamodeling score: do sums of scores predict the losses of models retrained on random subsets?

    The retrained models are kept: methods added later use the same.
    """
    from infl_cli.experiment_requests import ensemble_ranking, require_used
    from infl_cli.launch import carry_out
    from influence_jobs.specs import LdsSpec, make_spec
    from influence_jobs.store.run import Run

    root = runs_folder(runs)
    methods = by or COMPARED
    trained, asked = _subject(weights, queries, data, root, methods, seed=seed)
    rankings = tuple(
        ensemble_ranking(word, trained, asked, curvature, root=root, seed=seed, ensemble=ensemble)
        for word in methods
    )
    require_used(curvature, methods)
    spec = make_spec(
        LdsSpec,
        task=trained.subject.task,
        recipe=trained.train,
        rankings=rankings,
        seeds=tuple(range(seeds)),
        subsets=subsets,
        fraction=fraction,
    )
    carry_out(Run(root, spec), how)


@app.command()
@grouped
def paper(
    weights: o.Weights,
    data: o.QueriedData,
    how: WorkersHow,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Short trainings and a small grid: minutes instead of hours.",
            rich_help_panel=_EXPERIMENT,
        ),
    ] = False,
    runs: o.Runs = o.DEFAULT_RUNS,
) -> None:
    """The report's experiments in one run: of section 4.1 (MNIST), or with --task ffdnet of section 4.2.

    It ends in the tables, and in a page with all figures in the run's folder.
    """
    from infl_cli.launch import carry_out
    from infl_cli.paper import paper_request
    from infl_cli.report import report_folder, write_report_of
    from influence_jobs.store.run import Run

    root = runs_folder(runs)
    run = Run(root, paper_request(weights, data, root, quick=quick))
    carry_out(run, how)
    if not (how.dry_run or how.detach or "://" in root):
        write_report_of([run], report_folder(run))


def _subject(
    weights: o.Weights,
    queries: QueryOptions,
    data: o.QueriedData,
    root: str,
    methods: Sequence[str],
    *,
    seed: int,
) -> "tuple[Trained, Queries]":
    """The training that is looked at, and the queries: the task's first named set if the user named none."""
    from infl_cli.experiment_requests import trained_request
    from infl_cli.requests import subject_request
    from infl_cli.score_requests import queries_request

    subject = subject_request(weights, data, root, default_task="mnist", say=say)
    trained = trained_request(subject, given=bool(weights.checkpoint), methods=methods)
    if not queries.test and not queries.test_set and subject.built.query_sets:
        queries = replace(queries, test_set=next(iter(subject.built.query_sets)))
    return trained, queries_request(queries, subject.built, seed=seed)
