"""Linear datamodeling scores of every method on the published protocol, by the command line.

The protocol (dattri, 2024), task `mnist-lds`: the perceptron 784-128-64-10 with dropout .1; the
first 5,000 training and 500 test images of MNIST, standardised; SGD with learning rate .01,
momentum .9, batch 64, 50 epochs; random halves of the training set. The same retrained models judge
all methods. With `--peers PYTHON`, an environment that has dattri, kronfluence and traker, their
scores too (lds_peers.py). With `--publish FOLDER` the losses and the halves are written as Parquet,
by which lds_of_file.py judges scores without this project.

    python benchmarks/lds.py --runs lds-runs
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from influence_jobs.experiments.lds import subset
from influence_jobs.kinds.lds.spec import LdsSpec
from influence_jobs.kinds.train.spec import TrainSpec
from influence_jobs.store.find import find_run
from influence_jobs.store.layout import checkpoint_name
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.mnist import MnistLdsTask
from influence_jobs.tasks.registry import make_task

INFL = str(Path(sys.executable).with_name("infl"))
TASK = ("--task", "mnist-lds")
EARLY = ("--epochs", "3")  # later the models fit their training set very well
# The published recipe: the Hessian of all samples, ten iterations from zero.
RECIPE = (
    *("--solver", "cg", "--operator", "hessian", "--curvature-samples", "all"),
    *("--damping", ".005", "--max-iterations", "10", "--tolerance", "1e-7"),
)
UNTRAINED = {
    "nearest pixels": ("baseline", "--method", "nearest"),
    "random": ("baseline", "--method", "random"),
}


def run(words: Sequence[str], runs: str) -> str:
    """Run `infl submit` and return the id of its run."""
    command = [INFL, "submit", *words, "--runs", runs, "--local", "--json"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: str = json.loads(answer.stdout.splitlines()[-1])["run"]
    return found


def peers(python: str, trained: Sequence[str], runs: str, tests: int, folder: Path) -> list[str]:
    """Words `NAME=FILE` for the scores of the other libraries, at the end of the trainings."""
    task, folder = MnistLdsTask(), folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    x_train, y_train = task.batch(torch.arange(len(task.train_data())), Draw(0))
    x_test, y_test = task.test_batch(torch.arange(tests), Draw(0))
    data = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    np.savez(folder / "data.npz", **{name: part.numpy() for name, part in data.items()})
    script = str(Path(__file__).with_name("lds_peers.py"))
    words = [python, script, "--data", str(folder / "data.npz"), "--out", str(folder)]
    for name in trained:
        spec = find_run(runs, name).spec
        assert isinstance(spec, TrainSpec)
        words += ["--weights", str(Path(runs).absolute() / name / checkpoint_name(spec.epochs))]
    subprocess.run(words, check=True)
    return [f"{path.stem}={path}" for path in sorted(folder.glob("*.npy"))]


def publish(runs: str, name: str, folder: Path) -> None:
    """Write the losses of an LDS run's retrained models, and its subsets, as Parquet.

    losses.parquet has a row for each (subset, seed) with the losses on all tests, subsets.parquet a
    row for each training sample, and for each subset a column that says whether it has the sample.
    """
    found = find_run(runs, name)
    spec = found.spec
    assert isinstance(spec, LdsSpec)
    losses_RQ = np.asarray(found.array("losses")[:], dtype=np.float32)
    n, seeds = len(make_task(spec.task).train_data()), len(spec.seeds)
    members = {
        str(i): np.isin(np.arange(n), subset(n, spec.fraction, i)) for i in range(spec.subsets)
    }
    rows = np.arange(len(losses_RQ))
    losses = pa.array(list(losses_RQ), type=pa.list_(pa.float32()))
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"subset": rows // seeds, "seed": rows % seeds, "losses": losses})
    pq.write_table(table, folder / "losses.parquet", compression="zstd", use_dictionary=False)
    pq.write_table(pa.table(members), folder / "subsets.parquet", compression="zstd")


def main(
    runs: Annotated[str, typer.Option(help="Folder of runs; what is there is used.")] = "lds-runs",
    tests: Annotated[int, typer.Option(help="Test images.")] = 500,
    subsets: Annotated[int, typer.Option(help="Random halves.")] = 100,
    seeds: Annotated[int, typer.Option(help="Models of each half.")] = 3,
    models: Annotated[int, typer.Option(help="Of an ensemble, at most.")] = 10,
    late: Annotated[int, typer.Option(help="Of those trained to the end, as published.")] = 3,
    curvature: Annotated[str, typer.Option(help="Options of influence.")] = "",
    python: Annotated[str, typer.Option("--peers", help="Python that has the libraries.")] = "",
    folder: Annotated[Path | None, typer.Option("--publish", help="Folder of the losses.")] = None,
) -> None:
    """Compute all scores, then one LDS run over all of them; print its table."""
    trained = [run(("train", *TASK, "--seed", str(seed)), runs) for seed in range(late)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as ids:
        ids.write("\n".join(map(str, range(tests))))
        ids.flush()
        query = ("--test-set", ids.name)
        early = ("influence", *TASK, *EARLY, *curvature.split(), *query)
        last = ("--checkpoint", trained[0], *query)
        asked = {
            **{
                f"influence, {count} models": (*early, "--models", str(count))
                for count in sorted({1, 3, models})
            },
            "influence, EK-FAC, one model": (*early, "--models", "1", "--solver", "ek-fac"),
            f"influence, EK-FAC, {models} models": (
                *(*early, "--models", str(models)),
                *("--solver", "ek-fac"),
            ),
            "the published recipe (Hessian, CG)": ("influence", *last, *RECIPE),
            "gradient dot product": ("baseline", "--method", "dot-product", *last),
            "training loss": ("baseline", "--method", "loss", *last),
            **{name: (*words, *TASK, *query) for name, words in UNTRAINED.items()},
        }
        by = [f"{name}={run(words, runs)}" for name, words in asked.items()]
        if python:
            by += peers(python, trained, runs, tests, Path(runs) / f"peers-{tests}")
        words = ["--subsets", str(subsets), "--seeds", str(seeds)]
        command = [INFL, "submit", "lds", "--checkpoint", trained[0], *query, *words]
        for word in by:
            command += ["--by", word]
        subprocess.run([*command, "--runs", runs, "--local"], check=True)
        if folder is not None:
            publish(runs, run(command[2:], runs), folder)


if __name__ == "__main__":
    typer.run(main)
