"""`infl submit`: one command a kind of job."""

from typing import Annotated, Any, Literal

import typer

from infl_cli import options as o
from infl_cli.grouped import grouped
from infl_cli.how import How, ShardedHow
from infl_cli.render import say
from influence_jobs.errors import SpecError
from influence_jobs.store.folder import runs_folder

# What loads torch is imported by the commands themselves: help and completion must not wait for it.

app = typer.Typer(
    no_args_is_help=True, help="Compute something: a run that can be watched, stopped and resumed."
)

RECIPE = "Training"


@app.command()
@grouped
def train(
    data: o.TrainingData,
    how: How,
    task: o.Task = "mnist",
    preset: o.Preset = None,
    epochs: o.Epochs = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of weights, order and noise.", rich_help_panel=RECIPE)
    ] = 0,
    save_epoch: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Keep the weights of this epoch too. May be repeated.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    optimizer: Annotated[
        Literal["sgd", "adam"] | None,
        typer.Option(help="The preset's, else sgd, by default.", rich_help_panel=RECIPE),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", rich_help_panel=RECIPE)] = None,
    momentum: Annotated[float | None, typer.Option(help="Of SGD.", rich_help_panel=RECIPE)] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="L2 penalty.", rich_help_panel=RECIPE)
    ] = None,
    train_batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Samples a step.", rich_help_panel=RECIPE),
    ] = None,
    norms_layer: Annotated[
        list[str] | None,
        typer.Option(
            help="Record this layer's batch-gradient norms while training (Algorithm 1). May be repeated.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    norms_skip_epochs: Annotated[
        int | None,
        typer.Option(
            min=0, help="First epochs not recorded; 1 by default.", rich_help_panel=RECIPE
        ),
    ] = None,
    reduce: o.RecordedReduce = None,
    runs: o.Runs = o.DEFAULT_RUNS,
) -> None:
    """Train a model of a task; keeps weights at chosen epochs, and gradient norms if asked."""
    from infl_cli.launch import carry_out
    from infl_cli.requests import task_arguments, task_request, train_request
    from influence_jobs.store.run import Run
    from influence_jobs.tasks.layers import resolve_layers

    task_spec, built = task_request(
        task, task_arguments(data), skip_unreadable=data.skip_unreadable, say=say
    )
    given: dict[str, Any] = {
        "epochs": epochs,
        "seed": seed,
        "save_epochs": tuple(save_epoch) if save_epoch else None,
        "optimizer": optimizer,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "batch_size": train_batch_size,
    }
    if norms_layer:
        given |= {
            "norm_layers": resolve_layers(norms_layer, built),
            "norm_reduction": reduce,
            "norm_skip_epochs": norms_skip_epochs,
        }
    else:
        for name, value in (("norms-skip-epochs", norms_skip_epochs), ("reduce", reduce)):
            if value is not None:
                raise SpecError(f"--{name} needs --norms-layer")
    spec = train_request(task_spec, preset=preset, given=given)
    carry_out(Run(runs_folder(runs), spec), how)


@app.command("grad-norms")
@grouped
def grad_norms(
    weights: o.Weights,
    data: o.AttributionData,
    how: ShardedHow,
    layer: o.Layers = None,
    reduce: o.Reduce = "channel",
    combine: o.Combine = "sum",
    precision: o.Precision = "float32",
    seed: o.Seed = 0,
    runs: o.Runs = o.DEFAULT_RUNS,
) -> None:
    """Per-sample gradient norms of chosen layers, at one or several checkpoints.

    `infl submit grad-norms --layer 11` alone works on a bare machine: it trains FFDNet for a few
    epochs on sample photographs and writes the norms of its eleventh convolution.
    """
    from infl_cli.launch import carry_out
    from infl_cli.requests import subject_request
    from influence_jobs.specs import GradNormsSpec, make_spec
    from influence_jobs.store.run import Run
    from influence_jobs.tasks.layers import resolve_layers

    if not layer:
        raise SpecError("name at least one layer: --layer 11, --layer main.29, or --layer all")
    root = runs_folder(runs)
    subject = subject_request(weights, data, root, default_task="ffdnet", say=say)
    spec = make_spec(
        GradNormsSpec,
        task=subject.task,
        checkpoints=subject.checkpoints,
        layers=resolve_layers(layer, subject.built),
        reduction=reduce,
        combine=combine,
        precision=precision,
        seed=seed,
    )
    carry_out(Run(root, spec), how)
