"""The options that several commands share, each written once."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from influence_jobs.store import folder

DEFAULT_RUNS = folder.DEFAULT_RUNS

_HOW = "How to run"
_WHAT = "What to compute"
_DATA = "Data"

Task = Annotated[
    str,
    typer.Option(
        help="mnist, mnist-dropout, ffdnet, ffdnet-grey, or your own as module:Class.",
        rich_help_panel=_WHAT,
    ),
]
TaskOfCheckpoint = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="mnist, mnist-dropout, ffdnet, ffdnet-grey, or your own as module:Class; "
        "by default that of --checkpoint RUN, else ffdnet for norms and mnist for scores.",
        rich_help_panel=_WHAT,
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        help="Layer number (from 1, in forward order), module name, or all. May be repeated.",
        rich_help_panel=_WHAT,
    ),
]
_REDUCE = (
    "kernel: (N,C,kh,kw), L2 norm over the inputs; channel: (N,C), those summed over the kernel; "
    "layer: (N), L2 norm of the whole weight gradient."
)
Reduce = Annotated[
    Literal["kernel", "channel", "layer"], typer.Option(help=_REDUCE, rich_help_panel=_WHAT)
]
RecordedReduce = Annotated[
    Literal["kernel", "channel", "layer"] | None,
    typer.Option("--reduce", help=f"{_REDUCE} By default channel.", rich_help_panel=_WHAT),
]
Checkpoints = Annotated[
    list[str] | None,
    typer.Option(
        "--checkpoint",
        help="Train run, RUN@EPOCH, RUN@all, or a state-dict file. May be repeated. "
        "One is trained by the preset if none is named.",
        rich_help_panel=_WHAT,
    ),
]
Combine = Annotated[
    Literal["sum", "keep"],
    typer.Option(
        help="Norms of several checkpoints: their sum, or each on a leading axis.",
        rich_help_panel=_WHAT,
    ),
]
Precision = Annotated[
    Literal["float32", "float64", "bfloat16"],
    typer.Option(help="Of the computation; bfloat16 is autocast.", rich_help_panel=_WHAT),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sample noise.", rich_help_panel=_WHAT)]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Training preset: a name, or a YAML file of your own.", rich_help_panel=_WHAT
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(min=1, help="Epochs to train; the preset's by default.", rich_help_panel=_WHAT),
]


@dataclass(frozen=True)
class Weights:
    """Which task, and which of its trained weights."""

    task: TaskOfCheckpoint = None
    checkpoint: Checkpoints = None
    preset: Preset = None
    epochs: Epochs = None


Images = Annotated[
    str | None,
    typer.Option(
        help="Folder of training images (jpg, png, bmp, tif); by default the photographs that ship with "
        "scikit-image and scikit-learn.",
        rich_help_panel=_DATA,
    ),
]
TestImages = Annotated[
    str | None,
    typer.Option(
        help="Folder of test images, for validation and as queries.", rich_help_panel=_DATA
    ),
]
PatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Side of a patch, in pixels; 50 by default.", rich_help_panel=_DATA),
]
Stride = Annotated[
    int | None,
    typer.Option(
        min=1, help="Step between patches, in pixels; 25 by default.", rich_help_panel=_DATA
    ),
]
Sigma = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Noise level in attribution, in grey levels of 255; 25 by default.",
        rich_help_panel=_DATA,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Only the first so many training samples.", rich_help_panel=_DATA),
]
SkipUnreadable = Annotated[
    bool,
    typer.Option(
        "--skip-unreadable", help="Leave out images that cannot be decoded.", rich_help_panel=_DATA
    ),
]
DataDir = Annotated[
    str | None,
    typer.Option(
        help="Folder of downloaded data; by default INFL_DATA, else your cache folder.",
        rich_help_panel=_DATA,
    ),
]
TaskOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="An argument of your own task. May be repeated.",
        rich_help_panel=_DATA,
    ),
]


@dataclass(frozen=True)
class Data:
    """Arguments of the task, and where its data lie."""

    images: Images = None
    patch_size: PatchSize = None
    stride: Stride = None
    limit: Limit = None
    skip_unreadable: SkipUnreadable = False
    data_dir: DataDir = None
    option: TaskOptions = None
    sigma: float | None = None
    test_images: str | None = None


@dataclass(frozen=True)
class TrainingData(Data):
    """Of a training, which draws its noise levels itself and validates on test images."""

    test_images: TestImages = None


@dataclass(frozen=True)
class AttributionData(Data):
    """Of what is measured of training samples, at one noise level."""

    sigma: Sigma = None


@dataclass(frozen=True)
class QueriedData(AttributionData):
    """Of what explains test samples."""

    test_images: TestImages = None


Runs = Annotated[
    str,
    typer.Option(
        envvar="INFL_RUNS", help="Folder of all runs: a path, s3:// or gs://.", rich_help_panel=_HOW
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Dashboard address of a Ray cluster, http(s)://HOST:PORT; a local Ray is started if not given.",
        rich_help_panel=_HOW,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Worker processes; one a core or GPU by default.", rich_help_panel=_HOW
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="Where workers compute.", rich_help_panel=_HOW),
]
NumGpus = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="GPUs of each worker; fractions share one. On cuda 1 by default.",
        rich_help_panel=_HOW,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Samples a pass; the task's own by default.", rich_help_panel=_HOW),
]
ShardSize = Annotated[
    int | None,
    typer.Option(min=1, help="Samples a shard, rounded up to whole chunks.", rich_help_panel=_HOW),
]
ModelsOfShard = Annotated[
    int | None,
    typer.Option("--shard-size", min=1, help="Retrained models a shard.", rich_help_panel=_HOW),
]
Local = Annotated[
    bool,
    typer.Option("--local", help="Compute in this process, without Ray.", rich_help_panel=_HOW),
]
Detach = Annotated[
    bool,
    typer.Option("--detach", help="Return as soon as the job is submitted.", rich_help_panel=_HOW),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only print the plan and an estimate from a short probe.",
        rich_help_panel=_HOW,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object as the last line of standard output.",
        rich_help_panel=_HOW,
    ),
]

RunId = Annotated[
    str, typer.Argument(metavar="RUN", help="Run id, or the first characters of it or of its hash.")
]


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
