"""From `infl submit s-test` to a contact sheet, in a user's steps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from influence_jobs.store.run import Run

Infl = Callable[..., Any]
DIGITS = ("--checkpoint", "train-digits", "--local")
CHEAP = ("--curvature-samples", "200", "--damping", ".1")


def test_from_a_query_to_its_samples(infl: Infl, runs: Path, tmp_path: Path) -> None:
    solved = infl("submit", "s-test", *DIGITS, *CHEAP, "--test", 5, "--test", 111)
    assert solved.code == 0, solved.err
    assert "lambda = 0.1; residual up to" in solved.out
    assert "next: infl submit influence --s-test s-test-digitstask-" in solved.out
    scored = infl("submit", "influence", "--local", "--s-test", "s-test-digits", "--json").json
    assert scored["arrays"]["scores"]["shape"] == [2, 1500]
    assert set(scored["tables"]) == {"queries", "samples"}

    words = ("top", scored["run"], "--k", 3)
    top = infl(*words, "--json").json["top"]["scores"]
    scores = Run.open(str(runs), scored["run"]).read_rows("scores", 0, 1500)
    helpful = [row for row in top if row["test"] == 111 and row["side"] == "helpful"]
    assert [row["sample"] for row in helpful] == np.argsort(-scores[1], kind="stable")[:3].tolist()
    harmful = [row for row in top if row["test"] == 111 and row["side"] == "harmful"]
    assert [row["sample"] for row in harmful] == np.argsort(scores[1], kind="stable")[:3].tolist()
    assert all({"label", "rank", "score"} <= row.keys() for row in top)

    shown = infl(*words, "--test", 111, "--parquet", "top.parquet", "--png", "top.png")
    assert "sign: positive = helpful, negative = harmful; unit: loss" in shown.out
    assert "test 111 (label " in shown.out
    assert "test 5 " not in shown.out
    assert len(pq.read_table("top.parquet")) == 6
    with Image.open("top.png") as sheet:
        assert min(sheet.size) > 200
        assert len(sheet.convert("L").getcolors(256) or ()) > 16  # there are pictures on it


def test_the_published_setting_says_its_effective_damping(infl: Infl, runs: Path) -> None:
    published = (
        "--damping",
        ".01",
        "--scale",
        "25",
        "--depth",
        "50",
        "--repeats",
        "2",
        "--batch",
        "8",
    )
    words = ("submit", "s-test", *DIGITS, "--test", 5, *published)
    answer = infl(*words, "--curvature-samples", 200)
    assert "lambda = damping 0.01 x scale 25 = 0.25" in answer.err
    assert "lambda = 0.25; residual" in answer.out
    assert "the recursion's own damping 0.01 x scale 25, batches of 8" in answer.out


def test_options_that_mean_the_same_are_one_run(infl: Infl, runs: Path) -> None:
    words = ("submit", "influence", *DIGITS, *CHEAP)
    first = infl(*words, "--test", 5, "--test", 7, "--json").json["run"]
    (runs.parent / "ids.txt").write_text("5\n7\n")
    second = infl(*words, "--test-set", "ids.txt")
    assert f"{first} is already done" in second.err
    other = infl(
        *words, "--test", 5, "--test", 7, "--relative", "theta", "--layer", "all", "--json"
    )
    assert other.json["run"] != first


def test_s_test_vectors_of_another_checkpoint_are_refused(infl: Infl, runs: Path) -> None:
    assert infl("submit", "s-test", *DIGITS, *CHEAP, "--test", 5).code == 0
    words = ("submit", "influence", "--local", "--s-test", "s-test-digits", "--checkpoint")
    refused = infl(*words, "train-digits@1")
    assert refused.code == 2
    assert "is of another checkpoint than train-digits@1: scores need the s_test" in refused.err
    assert infl(*words, "train-digits@2").code == 0


@pytest.mark.parametrize("method", ["random", "loss", "dot-product", "nearest"])
def test_baselines_and_attribution_rank_samples_too(infl: Infl, runs: Path, method: str) -> None:
    words = ("submit", "baseline", *DIGITS, "--test", 5, "--method", method, "--json")
    run = infl(*words).json["run"]
    assert infl("top", run, "--k", 2).code == 0


def test_attribution_ranks_by_stored_norms(infl: Infl, runs: Path) -> None:
    words = ("submit", "attribution", *DIGITS, "--norms", "grad", "--layer", "2", "--test", 5)
    run = infl(*words, "--normalize", "--keep-layers", "--json").json["run"]
    top = infl("top", run, "--k", 2, "--layer", "conv2", "--json").json["top"]["parts/conv2"]
    assert [row["rank"] for row in top] == [1, 2]
    assert {row["side"] for row in top} == {"attribution"}
    nowhere = infl("top", run, "--parquet", "none/x.parquet")
    assert (nowhere.code, "there is no folder none" in nowhere.err) == (2, True)
    refused = infl("top", run, "--side", "harmful")
    assert refused.code == 2
    assert "--side has no meaning for attribution-digitstask" in refused.err


def test_a_run_that_leaves_all_samples_out_says_so(infl: Infl, runs: Path) -> None:
    words = ("submit", "attribution", *DIGITS, "--norms", "grad", "--layer", "2", "--test", 5)
    run = infl(*words, "--exclude-norm-above", "1e-9", "--json").json["run"]
    refused = infl("top", run, "--png", "x.png")
    assert refused.code == 2
    assert "leaves all samples out" in refused.err
    told = infl("report", run)
    assert told.code == 0
    assert f"{run}: nothing to show: {run} leaves all samples out" in told.err


def test_s_test_runs_have_no_scores_yet(infl: Infl, runs: Path) -> None:
    run = infl("submit", "s-test", *DIGITS, *CHEAP, "--test", 5, "--json").json["run"]
    refused = infl("top", run)
    assert refused.code == 2
    assert f"infl submit influence --s-test {run}" in refused.err
    twice = infl("submit", "influence", "--local", "--s-test", run, "--s-test", run)
    assert f"{run} is named twice" in twice.err


def test_vectors_of_weights_that_were_trained_again_are_refused(infl: Infl, runs: Path) -> None:
    run = infl("submit", "s-test", *DIGITS, *CHEAP, "--test", 5, "--json").json["run"]
    plan = runs / run / "plan.json"
    stored = json.loads(plan.read_text())
    (name,) = stored["inputs"]
    stored["inputs"][name] = "0" * 64  # as if the model had been trained again since
    plan.write_text(json.dumps(stored))
    refused = infl("submit", "influence", "--local", "--s-test", run)
    assert refused.code == 2
    assert f"run {run} was computed from an earlier {name}," in refused.err


def test_attribution_takes_the_last_epoch_of_norms_over_several(infl: Infl, runs: Path) -> None:
    norms = infl(
        "submit",
        "grad-norms",
        "--checkpoint",
        "train-digits@all",
        "--layer",
        "2",
        "--local",
        "--json",
    ).json["run"]
    words = ("submit", "attribution", "--local", "--norms", norms, "--test", 5, "--json")
    spec: Any = Run.open(str(runs), infl(*words).json["run"]).spec
    assert spec.checkpoint.epoch == 2


def test_a_dry_run_of_influence_counts_all_it_needs(infl: Infl, runs: Path) -> None:
    words = ("submit", "influence", *DIGITS, *CHEAP, "--test", 5, "--dry-run", "--json")
    plan = infl(*words).json
    assert [needed["run"].split("-")[0] for needed in plan["needs_first"]] == ["s"]
    assert plan["samples"] == 1500
    assert not list(runs.glob("s-test*"))
    fresh = infl(
        "submit", "influence", "--task", "digits:DigitsTask", "--test", 5, "--dry-run", "--json"
    )
    needs = [needed["run"].rsplit("-", 2)[0] for needed in fresh.json["needs_first"]]
    assert needs == ["train", "s-test"]
    assert json.dumps(plan)
