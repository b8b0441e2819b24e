"""Makes runs.tar.xz: small runs of every kind, finished or half finished, for later versions.

Run it with the revision whose runs are to be kept, from the root of a clean checkout::

    python tests/runs_of_format_1/make.py

The archive beside this file was made by revision 4c8d190. Later code must read that one: an archive
that it made itself would prove nothing.

In the archive:
    runs/           the runs
    ffdnet/         images and weights of the denoiser's runs
    asked.json      the command that made each run, by run id
    half.json       ids of the runs that were stopped half way, by kind
    resumed.npz     what those hold once they are resumed, by kind and name
"""

import contextlib
import io
import json
import os
import shutil
import socket
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from infl_cli import launch
from infl_cli.main import main
from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.jobs import saved_state
from influence_jobs.jobs.base import Shard
from influence_jobs.models.ffdnet import FFDNet
from influence_jobs.specs import PaperSpec, make_spec
from influence_jobs.store.run import Run
from influence_jobs.training.train import Trainer

HERE = Path(__file__).parent
FOLDER = Path("/tmp/runs_of_format_1")  # the denoiser's specs keep where its images lay
ASKED: dict[str, str] = {}

TINY = "--task tiny_task:Tiny"
RECIPE = "--epochs 4 --batch-size 8 --lr 0.1"
TESTS = "--test 0 --test 3"


def infl(words: str, code: int = 0) -> str:
    """Run a command in this process; returns what it printed."""
    sys.argv = ["infl", *words.split(), "--local"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            main()
        except SystemExit as leaving:
            assert leaving.code == code, words
    return said.getvalue()


def submit(words: str) -> str:
    """Make a run; returns its id."""
    said = infl(f"submit {words} --json")
    run: str = json.loads(said.splitlines()[-1])["run"]
    ASKED[run] = f"submit {words}"
    return run


def submit_and_stop(words: str) -> str:
    """Begin a run, whose command is stopped by Ctrl-C."""
    infl(f"submit {words}", code=130)
    states = {
        path.parent.name: json.loads(path.read_text())["state"]
        for path in Path("runs").glob("*/status.json")
    }
    (run,) = (run for run, state in states.items() if state == "stopped" and run not in ASKED)
    ASKED[run] = f"submit {words}"
    return run


class StopsAfterOne(InlineBackend):
    """Ends as Ctrl-C does, after the first of several shards."""

    def run(self, run: Run, shards: Sequence[Shard], **callbacks: Callable[..., None]) -> None:
        super().run(run, shards[:1], **callbacks)
        if len(shards) > 1:
            raise KeyboardInterrupt


def half_run(words: str) -> str:
    """A run of which one shard is done."""
    with patch.object(launch, "InlineBackend", StopsAfterOne):
        return submit_and_stop(words)


def half_training(words: str) -> str:
    """A training that is stopped after its second epoch, with its state saved."""
    step = Trainer.step

    def step_or_stop(trainer: Trainer) -> float | None:
        if trainer.epoch == 2:
            raise KeyboardInterrupt
        return step(trainer)

    with (
        patch.multiple(saved_state, SAVE_EVERY_S=0.0, SAVE_SHARE=float("inf")),
        patch.object(Trainer, "step", step_or_stop),
    ):
        return submit_and_stop(words)


def make() -> dict[str, str]:
    """All runs; returns the half-finished ones by kind."""
    train = submit(f"train {TINY} {RECIPE} --save-epoch 2 --norms-layer 1")
    other = submit(f"train {TINY} {RECIPE} --save-epoch 2 --norms-layer 1 --seed 1")
    submit(f"train {TINY} --epochs 2 --optimizer adam --lr 0.01")
    at = f"--checkpoint {train}"

    norms = submit(f"grad-norms {at} --layer all")
    submit(f"grad-norms {at} --layer 2 --reduce layer --precision float64")
    submit(f"grad-norms {at}@all --layer 1 --combine keep")

    submit(f"s-test {at} {TESTS} --damping 0.1")
    lissa = submit(f"s-test {at} {TESTS} --solver lissa --repeats 2 --depth 50 --damping 0.1")

    influence = submit(f"influence {at} {TESTS}")
    submit(f"influence --s-test {lissa}")
    submit(f"influence {at} {TESTS} --damping 0.1 --relative theta")
    submit(f"influence {at} {TESTS} --damping 0.1 --solver ek-fac --layer all --keep-layers")
    submit(f"influence {at} --checkpoint {other} {TESTS} --combine mean")

    attribution = submit(f"attribution --norms {train} {TESTS}")
    submit(f"attribution --norms {norms} {TESTS} --normalize --keep-layers")

    for method in ("random", "loss", "nearest", "dot-product"):
        submit(f"baseline {at} {TESTS} --method {method}")

    two = "--by helpful --by random"
    ablation = submit(f"ablation {at} {TESTS} --k 2 {two}")
    submit(
        f"ablation {at} {TESTS} --k 2 --mode relabel --relabel-to next"
        f" --by attribution --by mine={influence}"
    )
    submit(f"lds {at} {TESTS} --subsets 3 {two}")
    stability = submit(f"stability {at} {TESTS} --retrainings 2 --top 5 --by helpful")

    together = (train, influence, attribution, stability, ablation)
    parts = tuple(Run.open("runs", run).spec for run in together)
    paper = Run.create("runs", make_spec(PaperSpec, task=parts[1].task, parts=parts))
    drive("runs", paper.id, InlineBackend())

    write_denoiser()
    submit(
        "attribution --task ffdnet --images ffdnet/images --test-images ffdnet/tests --patch-size 8"
        " --stride 8 --checkpoint ffdnet/weights.pth --layer 11 --test 1 --point 3,5"
    )

    many = submit(f"train {TINY} --option rows=600 --epochs 1 --batch-size 64 --lr 0.1")
    return {
        "grad-norms": half_run(f"grad-norms --checkpoint {many} --layer all --shard-size 256"),
        "lds": half_run(f"lds {at} {TESTS} --subsets 3 --fraction 0.25 --by random --shard-size 1"),
        "train": half_training(f"train {TINY} {RECIPE} --seed 2"),
    }


def write_denoiser() -> None:
    """Images of noise, and weights that are large only before they are packed."""
    for name, seed in (("images", 0), ("tests", 1)):
        folder = Path("ffdnet", name)
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
        for file, image in zip(("a.png", "b.png"), pixels, strict=True):
            Image.fromarray(image).save(folder / file)
    weights = FFDNet(color=True).state_dict()
    for name, tensor in weights.items():
        if tensor.ndim > 1:
            places = torch.arange(tensor.numel()) % 101
            tensor.copy_((places.sub(50).sin() * 0.05).view(tensor.shape))
        elif name.endswith("bias"):
            tensor.zero_()
    torch.save(weights, "ffdnet/weights.pth")


def resumed(half: dict[str, str]) -> dict[str, npt.NDArray[Any]]:
    """What the half-finished runs hold at their end. They are resumed in a copy."""
    found: dict[str, npt.NDArray[Any]] = {}
    shutil.copytree("runs", "copy")
    for kind, run_id in half.items():
        infl(f"resume {run_id} --runs copy")
        run = Run.open("copy", run_id)
        found |= {f"{kind}/{name}": np.asarray(run.array(name)[:]) for name in run.array_names()}
    state = torch.load(f"copy/{half['train']}/checkpoints/epoch-0004.pt", weights_only=True)
    found |= {f"train/{name}": tensor.numpy() for name, tensor in state.items()}
    shutil.rmtree("copy")
    return found


def pack() -> None:
    """Write the archive: names in order, no owner, no time."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=9) as archive:
        for path in sorted(Path().rglob("*")):
            entry = archive.gettarinfo(str(path))
            entry.uid = entry.gid = entry.mtime = 0
            entry.uname = entry.gname = ""
            with path.open("rb") if path.is_file() else io.BytesIO() as content:
                archive.addfile(entry, content)
    (HERE / "runs.tar.xz").write_bytes(packed.getvalue())


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    socket.gethostname = lambda: "somewhere"  # workers sign with it
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    os.chdir(FOLDER)
    half = make()
    np.savez("resumed.npz", allow_pickle=False, **resumed(half))
    Path("half.json").write_text(json.dumps(half, indent=1))
    Path("asked.json").write_text(json.dumps(ASKED, indent=1))
    pack()
