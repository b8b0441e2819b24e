"""Overhead of the whole command: `infl submit grad-norms --task mnist --layer all`, 60,000 images.

It is compared with the bare loop (model, engine, numpy arrays; nothing is stored). Ray is up before
the command starts. Run it from the project's folder, on a machine with nothing else to do:

    python benchmarks/submit.py [--full]
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from harness import header, print_table, spread

from infl_cluster.head import current_head, ensure_head, stop_head
from influence_jobs.gradients import GradNorms
from influence_jobs.models.mnist_mlp import MnistMLP
from influence_jobs.store import layout
from influence_jobs.store.checkpoints import file_checkpoint, load_checkpoint
from influence_jobs.store.documents import Status
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.mnist import MnistTask

LAYERS = ("fc1", "fc2", "fc3")


def save_checkpoints(folder: Path, number: int) -> list[Path]:
    paths = []
    for seed in range(number):
        torch.manual_seed(seed)
        paths.append(folder / f"{seed}.pt")
        torch.save(MnistMLP().state_dict(), paths[-1])
    return paths


def bare_loop(task: MnistTask, checkpoints: list[Path]) -> float:
    """Samples a second of forward, truncated backward and norms, over all checkpoints."""
    model = MnistMLP().eval()
    n = len(task.train_data())
    sums = {name: np.zeros((n, model.get_submodule(name).out_features)) for name in LAYERS}
    with GradNorms(model, LAYERS, task.losses, reduction="channel") as engine:
        started = time.perf_counter()
        for path in checkpoints:
            load_checkpoint(model, "", file_checkpoint(str(path)))
            for ids in torch.arange(n).split(task.batch_size):
                for name, norms in engine(task.batch(ids, Draw(0))).items():
                    sums[name][ids[0] : ids[-1] + 1] += norms.numpy()
        return n * len(checkpoints) / (time.perf_counter() - started)


def fwd_bwd(task: MnistTask, passes: int) -> float:
    """Samples a second of plain forward and backward of the mean loss."""
    model = MnistMLP()
    n = len(task.train_data())
    started = time.perf_counter()
    for _ in range(passes):
        for ids in torch.arange(n).split(task.batch_size):
            model.zero_grad()
            task.losses(model, task.batch(ids, Draw(0))).mean().backward()
    return n * passes / (time.perf_counter() - started)


def command(checkpoints: list[Path], runs: Path) -> dict[str, float]:
    words = ["submit", "grad-norms", "--task", "mnist", "--layer", "all", "--json"]
    for path in checkpoints:
        words += ["--checkpoint", str(path)]
    started = time.time()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from infl_cli.main import main; main()",
            *words,
            "--runs",
            str(runs),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    ended = time.time()
    run = Run.open(str(runs), json.loads(done.stdout.splitlines()[-1])["run"])
    status = run.read_json(layout.STATUS, Status)
    assert status is not None
    entries = list(run.manifest.done().values())
    first = min(e.finished_at - e.seconds for e in entries if e.finished_at)
    last = max(e.finished_at for e in entries if e.finished_at)
    stored = sum(run.array(name).nbytes for name in run.array_names())
    samples = 60_000 * len(checkpoints)
    return {
        "command_s": ended - started,
        "before_first_shard_s": first - started,
        "shards_s": last - first,
        "after_last_shard_s": ended - last,
        "samples_per_s": samples / (last - first),
        "stored_MB_per_s": stored / 1e6 / (last - first),
    }


def main(
    full: Annotated[bool, typer.Option("--full", help="More rounds.")] = False,
) -> None:
    """Print a column for each number of checkpoints: median, smallest and largest."""
    rounds = 7 if full else 3
    header("What the whole command costs over the bare loop")
    columns: dict[int, dict[str, list[float]]] = {}
    task = MnistTask()
    task.batch(torch.arange(1), Draw(0))
    warm_before = current_head() is not None
    head = ensure_head(idle_timeout_s=600)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number in (1, 10):
                paths = save_checkpoints(Path(folder), number)
                rows: dict[str, list[float]] = {}
                for repeat in range(rounds):
                    figures = {
                        "fwd_bwd_samples_per_s": fwd_bwd(task, number),
                        "bare_loop_samples_per_s": bare_loop(task, paths),
                        **command(paths, Path(folder, f"runs-{number}-{repeat}")),
                    }
                    figures["samples_per_s_of_the_bare_loop"] = (
                        figures["samples_per_s"] / figures["bare_loop_samples_per_s"]
                    )
                    for name, value in figures.items():
                        rows.setdefault(name, []).append(value)
                columns[number] = rows
    finally:
        if not warm_before:
            stop_head(head)
    table = [
        [name.replace("_", " "), *(spread(column[name]) for column in columns.values())]
        for name in columns[1]
    ]
    print_table(["", *(f"{60_000 * number:,} samples" for number in columns)], table)
    print(f"\n{rounds} rounds; median (least-most). 600,000 are ten checkpoints, summed.")


if __name__ == "__main__":
    typer.run(main)
