"""Experiments from the command line to tables and pictures, in a user's steps."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from influence_jobs.kinds.stability.request import StabilityRequest
from influence_jobs.models.checkpoints import load_weights
from influence_jobs.specs.base import TaskSpec
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.registry import make_task

Infl = Callable[..., Any]
DIGITS = ("--checkpoint", "train-digits", "--local")
CHEAP = ("--curvature-samples", "200", "--damping", ".1")
TESTS = ("--test", 5, "--test", 111, "--test", 200)


def drawn(path: Path) -> bool:
    with Image.open(path) as image:
        return min(image.size) > 200 and len(image.convert("L").getcolors(256) or ()) > 16


def test_an_ablation_from_request_to_report(infl: Infl, runs: Path, tmp_path: Path) -> None:
    words = ("submit", "ablation", *DIGITS, *CHEAP, *TESTS, "--k", 50, "--k", 300)
    found = infl(*words, "--by", "helpful", "--by", "random")
    assert found.code == 0, found.err
    assert (
        "Change of the query's loss when its top k samples are relabelled or removed" in found.out
    )
    assert "next: infl report ablation-digitstask-" in found.out
    (folder,) = runs.glob("ablation-*")
    results = pq.read_table(folder / "tables/results.parquet").to_pylist()
    assert len(results) == 2 * 2 * 2 * 3
    assert {row["k"] for row in results} == {50, 300}
    # Without the most helpful samples the loss rises more than without any others.
    by = {
        (row["mode"], row["by"], row["k"]): row["mean_change"]
        for row in pq.read_table(folder / "tables/summary.parquet").to_pylist()
    }
    assert by["relabel", "helpful", 300] > by["relabel", "random", 300] > -1
    assert by["remove", "helpful", 300] > by["remove", "random", 300]

    assert "ranks no samples: infl report ablation-" in infl("top", "ablation").err
    shown = infl("report", "ablation", "--out", "drawn")
    assert shown.code == 0, shown.err
    assert shown.out == "drawn/report.html\n"
    assert drawn(tmp_path / f"drawn/figures/{folder.name}/ablation-helpful.png")
    text = (tmp_path / "drawn/tables.md").read_text()
    assert folder.name in text
    assert "| relabel | helpful | 300 |" in text
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [
        "figures",
        "report.html",
        "tables.md",
    ]


@pytest.mark.slow
def test_stability_trains_other_seeds_and_compares(infl: Infl, runs: Path) -> None:
    words = ("submit", "stability", *DIGITS, *CHEAP, *TESTS, "--top", 20, "--retrainings", 2)
    found = infl(*words)
    assert found.code == 0, found.err
    assert "Stability of harmful: share of the top 20" in found.out
    assert "In brackets" not in found.out  # the research report has numbers of other queries only
    (folder,) = runs.glob("stability-*")
    rows = pq.read_table(folder / "tables/results.parquet").to_pylist()
    assert len(rows) == 3 * 2 * 3
    assert all(0 <= row["overlap"] <= 1 for row in rows)
    assert len(list(runs.glob("train-*"))) == 3
    first = min(runs.glob("train-*"), key=lambda path: path.stat().st_mtime).name
    assert infl(*words[:2], "--checkpoint", first, *words[4:], "--json").json["run"] == folder.name


def test_lds_of_methods_runs_and_ensembles(infl: Infl, runs: Path) -> None:
    random = infl("submit", "baseline", "--method", "random", *DIGITS, *TESTS, "--json").json["run"]
    other = infl(
        "submit", "baseline", "--method", "random", "--seed", 1, *DIGITS, *TESTS, "--json"
    ).json["run"]
    words = ("submit", "lds", *DIGITS, *TESTS, "--subsets", 8, "--ensemble", 2)
    found = infl(*words, "--by", "dot-product", "--by", "loss", "--by", f"chance={random}+{other}")
    assert found.code == 2, found.out
    assert "needs the same queries with the same noise (--seed, --noise-draws)" in found.err
    found = infl(*words, "--by", "dot-product", "--by", "loss", "--by", f"chance={random}")
    assert found.code == 0, found.err
    assert (
        "Linear datamodeling score: 8 subsets of 0.5 of the samples, 1 training each" in found.out
    )
    (folder,) = runs.glob("lds-*")
    methods = pq.read_table(folder / "tables/summary.parquet").column("method").to_pylist()
    assert methods == ["dot-product x2", "loss x2", "chance"]
    assert infl("report", "lds", "--out", "drawn").code == 0
    assert drawn(Path(f"drawn/figures/{folder.name}/lds.png"))


def test_retrainings_are_of_the_seed_that_was_scored(infl: Infl, runs: Path) -> None:
    words = ("--task", "digits:DigitsTask", "--local", "--json")
    train = infl("submit", "train", *words, "--seed", 7, "--epochs", 1, "--lr", 0.05).json["run"]
    found = infl(
        "submit", "ablation", "--checkpoint", train, "--local", *TESTS, "--k", 9, "--by", "random"
    )
    assert found.code == 0, found.err
    (folder,) = runs.glob("ablation-*")
    rows = pq.read_table(folder / "tables/results.parquet").to_pylist()
    assert {row["seed"] for row in rows} == {7}
    # The model that nothing is done to is the scored model, trained again.
    scored = infl(
        "submit", "baseline", "--method", "loss", "--checkpoint", train, *TESTS, "--local"
    )
    assert scored.code == 0, scored.err
    task = make_task(TaskSpec(name="digits:DigitsTask", options={"width": 8}, data=""))
    model = task.model()
    load_weights(model, next(runs.glob(f"{train}/checkpoints/*.pt")))
    batch = task.test_batch(torch.tensor([row["test"] for row in rows[:3]]), Draw(0))
    with torch.no_grad():
        losses = task.losses(model.eval(), batch).tolist()
    assert [row["loss_before"] for row in rows[:3]] == pytest.approx(losses, rel=0.02, abs=2e-3)


def test_the_smallest_scores_of_a_run_are_its_harmful_samples(infl: Infl, runs: Path) -> None:
    words = (*DIGITS, *CHEAP, "--test", 5)
    run = infl("submit", "influence", *words, "--json").json["run"]
    ablation = ("submit", "ablation", *DIGITS, "--test", 5, "--k", 40, "--mode", "remove")
    assert infl(*ablation, *CHEAP, "--by", "harmful").code == 0
    trained = set(runs.glob("retrained-*/manifest/*"))
    assert infl(*ablation, "--by", f"harmful={run}").code == 0
    assert set(runs.glob("retrained-*/manifest/*")) == trained


@pytest.mark.slow
def test_the_report_of_several_runs_lies_in_the_first_ones_folder(infl: Infl, runs: Path) -> None:
    Path("file").touch()
    assert infl("report", "grad-norms", "--out", "file").err.startswith("error: cannot write")
    shown = infl("report", "grad-norms", "train-digits")
    assert shown.code == 0, shown.err
    (norms,), (train,) = runs.glob("grad-norms-*"), runs.glob("train-digits*")
    assert shown.out.strip() == str(norms / "report/report.html")
    text = (norms / "report/report.html").read_text()
    assert norms.name in text
    assert train.name in text
    assert drawn(norms / f"report/figures/{norms.name}/norms-conv2.png")
    # The report is no part of the run.
    assert infl("verify", "grad-norms").code == 0


@pytest.mark.slow
@pytest.mark.ray
def test_an_ablation_on_ray_is_the_same_as_in_process(
    infl: Infl, runs: Path, ray_head: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "examples"))
    words = ("submit", "ablation", "--checkpoint", "train-digits", *TESTS, "--k", 50)
    more = ("--by", "random", "--mode", "remove", "--shard-size", 2, "--json")
    found = infl(*words, *more)
    assert found.code == 0, found.err
    rows = pq.read_table(runs / found.json["run"] / "tables/results.parquet").to_pylist()
    for folder in (*runs.glob("retrained-*"), *runs.glob("ablation-*"), *runs.glob("baseline-*")):
        folder.rename(folder.with_name(f"was-{folder.name}"))
    again = infl(*words, *more, "--local")
    assert again.code == 0, again.err
    expected = pq.read_table(runs / again.json["run"] / "tables/results.parquet").to_pylist()
    for a, b in zip(rows, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02, abs=2e-3)
        assert a["test"] == b["test"]


def test_scores_of_a_file_are_put_to_the_test_by_the_tasks_own_training(
    infl: Infl, runs: Path, tmp_path: Path
) -> None:
    (saved,) = runs.glob("train-*/checkpoints/*2.pt")
    shutil.copy(saved, tmp_path / "mine.pt")
    words = ("--task", "digits:DigitsTask", "--checkpoint", "mine.pt", "--epochs", 1, "--test", 3)
    found = infl("submit", "ablation", "--local", *words, "--k", 50, "--by", "loss", "--json")
    assert found.code == 0, found.err
    assert (
        "it is not known how mine.pt was trained: scores are of its weights, and models are "
        "retrained as infl submit train --task digits:DigitsTask does (1 epochs of sgd, lr 0.003, "
        "batches of 8; --epochs and --preset change it)\n"
    ) in found.err
    assert infl("report", found.json["run"], "--out", "told").code == 0
    spec: Any = Run.open(str(runs), found.json["run"]).spec
    assert spec.recipe.epochs == 1
    (scores,) = spec.rankings[0].scores
    assert scores.checkpoint.path == str(tmp_path / "mine.pt")

    asked = StabilityRequest.of({**_options(words), "retrainings": 2, "by": "dot-product"})
    stability: Any = asked.specs(str(runs), print)[0]
    ((first, *others),) = stability.methods
    assert first.scores[0].s_tests[0].checkpoint == scores.checkpoint
    assert [r.scores[0].s_tests[0].checkpoint.train.seed for r in others] == [1, 2]

    refused = infl("submit", "grad-norms", "--local", *words[:-2], "--layer", "all")
    assert "--checkpoint names weights that exist" in refused.err


def _options(words: Sequence[Any]) -> dict[str, Any]:
    return {str(k).removeprefix("--"): v for k, v in zip(words[::2], words[1::2], strict=True)}
