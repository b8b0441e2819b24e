"""The figures of docs/use-cases: wrong labels found, and half of the data that does as well.

    python benchmarks/use_cases.py mislabelled --runs use-cases
    python benchmarks/use_cases.py pruning --runs use-cases

Seed i trains the network from seed i, and decides by i which labels are wrong and which samples
are drawn at random. Intervals are Student's, over the seeds. What is there already is used again.
"""

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from harness import print_table
from scipy import stats

import influence_jobs
from influence_jobs import Results
from influence_jobs.kinds.train.spec import TrainedCheckpoint
from influence_jobs.store.checkpoints import load_checkpoint
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.registry import make_task

TASK = str(Path(__file__).parents[1] / "examples" / "mislabelled.py") + ":Mislabelled"
RECIPE: dict[str, Any] = {"epochs": 15, "batch_size": 64, "lr": 0.02, "schedule": "cosine"}
EARLY, LAST = 5, 15  # epochs
SHARE = 0.05  # of the labels, that are wrong
SCORED = 100  # test images that samples are scored by; the others measure the error
Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.floating]

app = typer.Typer(add_completion=False)
Runs = Annotated[Path, typer.Option(help="Folder of all runs.")]
Seeds = Annotated[int, typer.Option(help="Number of seeds.")]
Share = Annotated[float, typer.Option(help="Of the labels, that are wrong.")]


def interval(values: Sequence[float], digits: int) -> str:
    """The mean, with its 95 % interval by Student's t."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return f"{mean:.{digits}f}"
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def trained(runs: Path, seed: int, share: float, **lists: Ids) -> Results:
    """A training, of all images, `without` some, or with the right labels on those `corrected`."""
    options: dict[str, Any] = {"share": share, "flip_seed": seed}
    if not lists:
        options["save_epoch"] = [EARLY]
    for name, images in lists.items():
        file = runs / f"{name}-{hash_of(images)}.csv"
        runs.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="") as lines:
            csv.writer(lines).writerows([["image"], *([i] for i in np.sort(images))])
        options[name] = str(file)
    return influence_jobs.submit(
        "train", task=TASK, runs=str(runs), seed=seed, quiet=True, **RECIPE, **options
    )


def hash_of(ids: Ids) -> str:
    """A short name of some ids."""
    return hashlib.sha256(np.sort(ids).tobytes()).hexdigest()[:12]


@torch.no_grad()
def error(run: Results, first: int = 0) -> float:
    """Of the test images from `first`, in per cent, after the last epoch."""
    task, spec = make_task(run.spec.task), run.spec
    model = task.model()
    load_checkpoint(model, run.run.root, TrainedCheckpoint(train=spec, epoch=spec.epochs))
    images, labels = task.test_batch(torch.arange(first, len(task.test_data())), Draw(0))
    return 100 * float((model.eval()(images).argmax(1) != labels).double().mean())


def self_influence(runs: Path, train: Results, epoch: int, solver: str) -> Results:
    """The self-influence of all samples at an epoch of a training."""
    at = f"{train.run.id}@{epoch}"
    return influence_jobs.submit(
        "self-influence", checkpoint=at, solver=solver, runs=str(runs), quiet=True
    )


def order(values: Values) -> Ids:
    """Samples by falling value."""
    return np.argsort(-values, kind="stable")


@app.command()
def mislabelled(runs: Runs = Path("use-cases"), seeds: Seeds = 5) -> None:
    """Find wrong labels, and train without them."""
    found: dict[str, dict[int, list[float]]] = {}
    errors: dict[str, list[float]] = {}
    for seed in range(seeds):
        train = trained(runs, seed, SHARE)
        rankings: dict[str, Ids] = {}
        for epoch in (EARLY, LAST):
            by_curvature = self_influence(runs, train, epoch, "ek-fac")
            by_norm = self_influence(runs, train, epoch, "identity")
            rankings |= {
                f"self-influence, epoch {epoch}": order(np.asarray(by_curvature["self_influence"])),
                f"loss, epoch {epoch}": order(np.asarray(by_curvature["losses"])),
                f"gradient norm, epoch {epoch}": order(np.asarray(by_norm["self_influence"])),
            }
        samples = by_curvature.table("samples")
        wrong = np.flatnonzero(samples["label"].to_numpy() != samples["true"].to_numpy())
        drawn = np.random.default_rng(1000 + seed).permutation(samples.num_rows)
        rankings["random"] = drawn
        for name, ranked in rankings.items():
            for k in (len(wrong) // 2, len(wrong), 2 * len(wrong)):
                hits = float(np.isin(ranked[:k], wrong).sum())
                found.setdefault(name, {}).setdefault(k, []).append(hits)
        k = len(wrong)
        by_influence = rankings[f"self-influence, epoch {EARLY}"]
        by_loss = rankings[f"loss, epoch {EARLY}"]
        changes: dict[str, dict[str, Ids]] = {
            "all samples": {},
            f"without {k} by self-influence, epoch {EARLY}": {"without": by_influence[:k]},
            f"without {k} by loss, epoch {EARLY}": {"without": by_loss[:k]},
            f"without the wrong ones among {k} by loss": {
                "without": np.intersect1d(by_loss[:k], wrong)
            },
            f"without {k} at random": {"without": drawn[:k]},
            f"without the {k} wrong ones": {"without": wrong},
            f"{k} by loss corrected": {"corrected": by_loss[:k]},
            f"{2 * k} by loss corrected": {"corrected": by_loss[: 2 * k]},
            f"{k} at random corrected": {"corrected": drawn[:k]},
        }
        for name, lists in changes.items():
            run = trained(runs, seed, SHARE, **lists) if lists else train
            errors.setdefault(name, []).append(error(run))
        errors.setdefault("right labels, all samples", []).append(error(trained(runs, seed, 0.0)))
        print(f"seed {seed} is done", flush=True)
    rows = []
    for name, by_k in found.items():
        cells = [
            f"{interval([100 * h / k for h in hits], 1)} / "
            f"{interval([100 * h / len(wrong) for h in hits], 1)}"
            for k, hits in by_k.items()
        ]
        rows.append([name, *cells])
    print_table(["ranked by", *(f"precision / recall at {k}, %" for k in by_k)], rows)
    differences = {
        name: [a - b for a, b in zip(values, errors["all samples"], strict=True)]
        for name, values in errors.items()
    }
    print_table(
        ["trained on", "test error, %", "difference"],
        [[name, interval(v, 2), interval(differences[name], 2)] for name, v in errors.items()],
    )


def half_of_each(values: Values, labels: Ids) -> Ids:
    """Of each label, the samples below the median of its values."""
    ranked = order(values)
    by_label = [ranked[labels[ranked] == label] for label in np.unique(labels)]
    return np.concatenate([ids[len(ids) // 2 :] for ids in by_label])


@app.command()
def pruning(runs: Runs = Path("use-cases"), seeds: Seeds = 5, share: Share = SHARE) -> None:
    """Train on the half that helps, and on random halves; some of the labels are wrong."""
    errors: dict[str, list[float]] = {}
    wrong: dict[str, list[float]] = {}
    for seed in range(seeds):
        train = trained(runs, seed, share)
        scores = influence_jobs.submit(
            "influence",
            checkpoint=f"{train.run.id}@{EARLY}",
            test=list(range(SCORED)),
            solver="ek-fac",
            runs=str(runs),
            quiet=True,
        )
        helps = np.asarray(scores["scores"], dtype=np.float64).mean(axis=0)
        ranked = order(helps)
        by_loss = order(np.asarray(self_influence(runs, train, EARLY, "ek-fac")["losses"]))
        half = len(ranked) // 2
        drawn = np.random.default_rng(2000 + seed).permutation(len(ranked))
        samples = scores.table("samples")
        labels = samples["label"].to_numpy()
        flipped = labels != samples["true"].to_numpy()
        for name, left_out in {
            "all": ranked[:0],
            "the half that helps": ranked[half:],
            "the half of each class that helps": half_of_each(helps, labels),
            "a random half": drawn[half:],
            "the half of smaller loss": by_loss[:half],
        }.items():
            run = trained(runs, seed, share, without=left_out) if len(left_out) else train
            errors.setdefault(name, []).append(error(run, SCORED))
            wrong.setdefault(name, []).append(float(np.delete(flipped, left_out).sum()))
        print(f"seed {seed} is done", flush=True)
    against = errors["a random half"]
    rows = []
    for name, values in errors.items():
        more = [a - b for a, b in zip(values, against, strict=True)]
        rows.append([name, interval(wrong[name], 0), interval(values, 2), interval(more, 2)])
    columns = ["trained on", "wrong labels in it", "test error, %", "minus that of a random half"]
    print_table(columns, rows)


if __name__ == "__main__":
    app()
