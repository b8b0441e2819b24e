"""Linear datamodeling scores of every method on the published protocol, by the command line.

The protocol (dattri, 2024): the perceptron 784-128-64-10 with dropout .1; the first 5,000 training
and 500 test images of MNIST; SGD with learning rate .01, momentum .9, batch 64, 50 epochs; random
halves of the training set. Each method is measured with one model. Methods that depend on the model
are also measured with mean scores over several models. All use the same retrained models.

    python benchmarks/lds.py --runs lds-runs
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

INFL = str(Path(sys.executable).with_name("infl"))
TASK = ("--task", "mnist-dropout", "--limit", "5000")
CURVATURE = ("--damping", ".001", "--curvature-samples", "1000")
# 500 queries at a residual of 1e-4 take hours on two cores.
CHEAP = [
    "--damping",
    ".01",
    "--curvature-samples",
    "1000",
    "--tolerance",
    ".05",
    "--max-iterations",
    "30",
]
# LiSSA's setting: effective damping .01 x 25. More accurate ones take hours for 500 queries.
PUBLISHED = [
    "--damping",
    ".01",
    "--scale",
    "25",
    "--depth",
    "1000",
    "--batch",
    "8",
    "--repeats",
    "1",
]
METHODS = {
    "influence, EK-FAC, epoch 3": ("influence", "--solver", "ek-fac", *CURVATURE),
    "influence, EK-FAC": ("influence", "--solver", "ek-fac", *CURVATURE),
    "influence, CG": ("influence", "--solver", "cg", *CHEAP),
    "influence, LiSSA as published": ("influence", "--solver", "lissa", *PUBLISHED),
    "gradient dot product": ("baseline", "--method", "dot-product"),
    "attribution": ("attribution",),
    "training loss": ("baseline", "--method", "loss"),
}
EARLY_EPOCH = 3  # later the models fit their training set very well, and gradients vanish
EARLY = ("influence, EK-FAC, epoch 3",)
ENSEMBLES = {
    "influence, EK-FAC, epoch 3": 10,
    "influence, EK-FAC": 10,
    "gradient dot product": 10,
    "attribution": 10,
}
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


def main(
    runs: Annotated[str, typer.Option(help="Folder of runs; what is there is used.")] = "lds-runs",
    tests: Annotated[int, typer.Option(help="Test images.")] = 500,
    subsets: Annotated[int, typer.Option(help="Random halves.")] = 100,
    seeds: Annotated[int, typer.Option(help="Models of each half.")] = 3,
    models: Annotated[int, typer.Option(help="Of an ensemble, at most.")] = 10,
) -> None:
    """Compute all scores, then one LDS run over all of them; print its table."""
    # Norms are recorded for attribution; the other methods ignore them.
    norms = ("--norms-layer", "1", "--norms-layer", "2")
    early = ("--save-epoch", str(EARLY_EPOCH))
    trained = [run(("train", *TASK, *norms, *early, "--seed", str(s)), runs) for s in range(models)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as ids:
        ids.write("\n".join(map(str, range(tests))))
        ids.flush()
        query = ("--test-set", ids.name)

        def scores(method: Sequence[str], model: str) -> str:
            source = ("--norms", model) if method[0] == "attribution" else ("--checkpoint", model)
            return run((*method, *source, *query), runs)

        by = [f"{name}={run((*method, *TASK, *query), runs)}" for name, method in UNTRAINED.items()]
        for name, method in METHODS.items():
            count = min(ENSEMBLES.get(name, 1), models)
            at = f"@{EARLY_EPOCH}" if name in EARLY else ""
            found = [scores(method, f"{model}{at}") for model in trained[:count]]
            by.append(f"{name}={found[0]}")
            if count > 1:
                by.append(f"{name}, {count} models={'+'.join(found)}")
        words = ["--subsets", str(subsets), "--seeds", str(seeds)]
        command = [INFL, "submit", "lds", "--checkpoint", trained[0], *query, *words]
        for word in by:
            command += ["--by", word]
        subprocess.run([*command, "--runs", runs], check=True)


if __name__ == "__main__":
    typer.run(main)
