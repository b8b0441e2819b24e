"""Calibration, ceilings, and scores of other libraries, in a user's steps."""

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from scipy.stats import spearmanr

from influence_jobs.experiments.lds import subset
from influence_jobs.kinds.calibrate.job import CHOOSING
from influence_jobs.kinds.calibrate.spec import setting_of
from influence_jobs.kinds.calibrate.view import options_of
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.store.run import Run

Infl = Callable[..., Any]
Refused = Callable[..., str]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
N, Q = 48, 3
TASK = f"{Path(__file__).with_name('halves.py')}:Tiny"
AT = ("--task", TASK, "--epochs", 8, "--local")
TESTS = ("--test", 0, "--test", 3, "--test", 4)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(folder / f"tables/{name}.parquet").to_pylist()
    return found


def members(indices: Any) -> npt.NDArray[np.float64]:
    return np.array([np.isin(np.arange(N), subset(N, 0.5, i)) for i in indices], dtype=float)


def scores_of_run(root: Path, run: str) -> npt.NDArray[Any]:
    return np.asarray(Run.open(str(root), run).array("scores")[:])


def lds_by_hand(scores_QN: Any, found_MQ: Any, indices: Any) -> float:
    predicted = -members(indices) @ np.asarray(scores_QN, dtype=float).T
    pairs = zip(predicted.T, found_MQ.T, strict=True)
    return float(np.mean([spearmanr(p, f).statistic for p, f in pairs]))


def test_a_setting_is_chosen_by_some_subsets_and_measured_on_others(infl: Infl, tiny: Path) -> None:
    grid = ("--epoch", 1, "--epoch", 8, "--damping", 0.1, "--solver", "cg")
    words = ("submit", "calibrate", *AT, *TESTS, *grid, "--models", 1, "--models", 2)
    found = infl(*words, "--subsets", 10, "--held-out", 12)
    assert found.code == 0, found.err
    (folder,) = tiny.glob("calibrate-*")
    run = Run.open(str(tiny), folder.name)
    spec: Any = run.spec
    assert len(spec.rankings) == 2 * 2
    losses = np.asarray(run.array("losses")[:]).reshape(22, 2, Q)

    def scores_of(ranking: Any) -> Any:
        runs = [Run.open(str(tiny), scores.run_id) for scores in ranking.scores]
        return np.mean([np.asarray(one.array("scores")[:]) for one in runs], axis=0)

    chosen_by, held_out = range(CHOOSING, CHOOSING + 10), range(12)
    by_hand = [
        lds_by_hand(scores_of(ranking), losses[:10].mean(axis=1), chosen_by)
        for ranking in spec.rankings
    ]
    told = rows(folder, "settings")
    assert [row["mean_lds"] for row in told] == pytest.approx(by_hand)
    assert all(row["seconds"] > 0 for row in told)
    best = spec.rankings[int(np.argmax(by_hand))]
    (result,) = rows(folder, "result")
    assert result["method"] == best.name
    measured = lds_by_hand(scores_of(best), losses[10:].mean(axis=1), held_out)
    assert result["mean_lds"] == pytest.approx(measured)
    assert result["low"] < measured < result["high"]

    agreement = np.mean([spearmanr(*losses[10:, :, q].T).statistic for q in range(Q)])
    (limit,) = rows(folder, "ceiling")
    assert limit["agreement"] == pytest.approx(agreement)
    assert limit["value"] == pytest.approx(np.sqrt(2 * agreement / (1 + agreement)))
    assert f"No method can pass {limit['value']:.2f}" in found.out

    # The command that it ends with gives the very scores that were measured.
    (command,) = [line for line in found.out.splitlines() if line.startswith("next: ")]
    again = infl(*shlex.split(command)[2:], *TESTS[2:], "--local", "--json")
    assert again.code == 0, again.err
    expected = scores_of(best)
    assert np.asarray(Run.open(str(tiny), again.json["run"]).array("scores")[:]) == pytest.approx(
        expected, rel=1e-5, abs=1e-6 * float(np.abs(expected).max())
    )
    assert setting_of(best).epoch in (1, 8)

    # `infl submit lds` counts the held-out subsets first, so it trains none of them again.
    kept = set(tiny.glob("retrained-*/manifest/*"))
    train = best.scores[0].s_tests[0].checkpoint.train.run_id
    lds = ("submit", "lds", "--checkpoint", train, *TESTS, "--by", "random", "--local")
    assert infl(*lds, "--subsets", 12, "--seeds", 2).code == 0
    assert set(tiny.glob("retrained-*/manifest/*")) == kept
    assert infl("report", folder.name, "--out", "page").code == 0
    assert "Chosen by 10 subsets, measured on 12 others" in Path("page/report.html").read_text()


def test_the_command_asks_for_what_was_measured() -> None:
    query = Query(test=4, region=(1, 2, 3, 4))
    queries = Queries(items=(query, Query(test=5)), quantity="output", noise_draws=3)
    words = ["--test 4", "--region 1,2,3,4", "--quantity output", "--noise-draws 3"]
    assert options_of(queries) == words
    assert options_of(Queries(items=(Query(test=5),))) == ["--test 5"]


def test_the_default_grid_has_early_epochs_and_both_solvers(infl: Infl, tiny: Path) -> None:
    words = ("submit", "calibrate", *AT, *TESTS, "--models", 1, "--subsets", 8, "--held-out", 8)
    found = infl(*words, "--dry-run", "--json")
    assert found.code == 0, found.err
    needed = [one["run"].rpartition("-")[0] for one in found.json["needs_first"]]
    assert needed.count("train-tiny") == 1
    assert needed.count("influence-tiny") % (2 * 3) == 0  # solvers, and epochs 1, 2 and 8


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--subsets", 7), "--subsets 7 gives too few subsets for a rank correlation: take 8 or"),
        (("--held-out", 2), "--held-out 2 gives too few subsets for a rank correlation: take 8"),
        (
            ("--seeds", 1),
            "--seeds 1: the ceiling is measured by how well two seeds agree, so take 2 or",
        ),
        (("--epoch", 9), "--epoch 9: the training has only 8 epochs"),
        (("--epoch", 0), "--epoch: input should be greater than or equal to 1"),
        (("--damping", 0), "--damping: input should be greater than 0"),
        (("--solver", "identity"), "--solver: input should be 'cg', 'ek-fac' or 'lissa'"),
        (("--models", 0), "--models: input should be greater than or equal to 1"),
    ],
)
def test_what_a_calibration_cannot_be_asked(
    refused: Refused, tiny: Path, words: tuple[Any, ...], expected: str
) -> None:
    assert expected in refused("submit", "calibrate", *AT, *TESTS, *words)


def test_influence_trains_its_models_and_averages(infl: Infl, tiny: Path) -> None:
    one = ("submit", "influence", *AT, "--test", 3, "--damping", 0.1)
    found = infl(*one, "--models", 3, "--seed", 4, "--json")
    assert found.code == 0, found.err
    run = Run.open(str(tiny), found.json["run"])
    spec: Any = run.spec
    trains = [s_test.checkpoint.train for s_test in spec.s_tests]
    assert sorted(train.seed for train in trains) == [4, 5, 6]
    assert spec.combine == "mean"
    alone = []
    for train in trains:
        at = ("--checkpoint", train.run_id, "--local", "--json")
        words = ("submit", "influence", *at, "--test", 3, "--damping", 0.1, "--seed", 4)
        alone.append(scores_of_run(tiny, infl(*words).json["run"]))
    together = scores_of_run(tiny, run.id)
    np.testing.assert_allclose(together, np.mean(alone, axis=0), rtol=1e-5, atol=1e-6)

    # From a training that exists: its seed and the seeds after it, at its epoch.
    before, first, _ = sorted(trains, key=lambda train: train.seed)
    existing = ("submit", "influence", "--checkpoint", first.run_id, "--local", "--test", 3)
    other: Any = Run.open(str(tiny), infl(*existing, "--models", 2, "--json").json["run"]).spec
    assert sorted(s_test.checkpoint.train.seed for s_test in other.s_tests) == [5, 6]
    several = infl(*existing, "--checkpoint", before.run_id, "--models", 2)
    assert several.code == 2
    assert "--models trains from other seeds itself: name one train run" in several.err
    (weights,) = tiny.glob(f"{first.run_id}/checkpoints/*.pt")
    shutil.copy(weights, "mine.pt")
    mine = infl(
        *existing[:2], "--task", TASK, "--checkpoint", "mine.pt", *existing[4:], "--models", 2
    )
    assert mine.code == 2
    assert "mine.pt" in mine.err
    assert "was trained: name a train run with --checkpoint, or leave --models out" in mine.err


def written(scores_QN: npt.NDArray[Any]) -> list[str]:
    """The same scores in every kind of file."""
    np.save("theirs.npy", scores_QN)
    lists = pa.array(list(scores_QN), type=pa.list_(pa.float64()))
    pq.write_table(pa.table({"scores": lists}), "lists.parquet")
    columns = {str(i): column for i, column in enumerate(scores_QN.T)}
    pq.write_table(pa.table(columns), "columns.parquet")
    values: Any = scores_QN  # zarr's own type of an array is another
    zarr.save_array("theirs.zarr", values)
    zarr.save_group("group", scores=values)
    return ["theirs.npy", "lists.parquet", "columns.parquet", "theirs.zarr", "group"]


def test_scores_of_another_library_are_judged(infl: Infl, tiny: Path) -> None:
    scores = np.random.default_rng(0).normal(size=(Q, N))
    files = written(scores)
    words = ("submit", "lds", *AT, *TESTS, "--subsets", 9, "--seeds", 2)
    by = [word for file in files for word in ("--by", f"{file.replace('.', '-')}={file}")]
    found = infl(*words, *by, "--by", "theirs.npy")
    assert found.code == 0, found.err
    (folder,) = tiny.glob("lds-*")
    losses = Run.open(str(tiny), folder.name).array("losses")[:]
    expected = lds_by_hand(scores, np.asarray(losses).reshape(9, 2, Q).mean(axis=1), range(9))
    summary = rows(folder, "summary")
    assert [row["method"] for row in summary] == [f.replace(".", "-") for f in files] + ["theirs"]
    assert [row["mean_lds"] for row in summary] == pytest.approx([expected] * 6)
    assert "of the ceiling" in found.out

    # Its numbers are in a run of their own, whatever becomes of the file.
    (given,) = tiny.glob("scores-*")
    Path("theirs.npy").unlink()
    assert infl("verify", given.name).code == 0
    top = infl("top", given.name, "--k", 1, "--json").json["top"]["scores"]
    assert top[0]["sample"] == int(scores[0].argmax())
    assert top[0]["side"] == "helpful"

    again = infl(*words, "--by", "theirs=lists.parquet", "--dry-run", "--json")
    assert [one["run"] for one in again.json["needs_first"]] == []
    ablation = ("submit", "ablation", *AT, "--test", 0, "--k", 5, "--mode", "remove")
    np.save("one.npy", scores[:1].astype(np.float32))
    removed = infl(*ablation, "--by", "theirs=one.npy")
    assert removed.code == 0, removed.err
    (recipe,) = {path.parent.parent for path in tiny.glob("retrained-*/manifest/*")}
    assert json.loads((recipe / "recipe.json").read_text())["epochs"] == 8


def test_scores_that_changed_after_submitting_are_refused(
    infl: Infl, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save("a.npy", np.ones((1, N)))
    from influence_jobs.kinds.scores.job import GivenScoresJob

    plan = GivenScoresJob.plan

    def changed(self: Any, shard_rows: int | None = None) -> Any:
        np.save("a.npy", np.zeros((1, N)))
        return plan(self, shard_rows)

    monkeypatch.setattr(GivenScoresJob, "plan", changed)
    found = infl("submit", "scores", *AT[:2], "--local", "--test", 3, "--file", "a.npy")
    assert found.code == 2
    assert "a.npy have changed since the run was submitted: restore the file" in found.err


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: None, "there is no file of scores bad.npy"),
        (lambda: np.save("bad.npy", np.ones((N, 1))), "48 x 1, and there are 1 queries (rows) and"),
        (lambda: np.save("bad.npy", np.ones((N, 1))), "48 training samples (columns); transpose"),
        (lambda: np.save("bad.npy", np.ones(N)), "have shape 48, and there are 1 queries"),
        (
            lambda: np.save("bad.npy", np.full((1, N), np.nan)),
            "the first in row 0, column 0: every",
        ),
        (lambda: np.save("bad.npy", np.full((1, N), -np.inf)), "not all finite, the first in row"),
        (lambda: np.save("bad.npy", np.ones((1, N), int)), "are int64: write floating-point"),
        (lambda: np.save("bad.npy", np.ones((1, N), complex)), "are complex128: write floating"),
        (lambda: np.save("bad.npy", np.array([{}]), allow_pickle=True), "cannot read scores from"),
        (lambda: Path("bad.npy").write_text("1,2,3"), "write them as .npy, .parquet or .zarr"),
        (lambda: Path("bad.npy").mkdir(), "cannot read scores from bad.npy"),
    ],
)
def test_files_without_a_score_for_everything_are_refused(
    refused: Refused, tiny: Path, make: Callable[[], object], expected: str
) -> None:
    make()
    for experiment in ("lds", "ablation"):
        words = ("submit", experiment, *AT, "--test", 3, "--by", "theirs=bad.npy")
        assert expected in refused(*words)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: pq.write_table(pa.table({"a": [[1.0], [1.0, 2.0]]}), "bad.parquet"),
            "cannot read scores from bad.parquet",
        ),
        (
            lambda: pq.write_table(pa.table({"a": [[1.0], None]}), "bad.parquet"),
            "cannot read scores from bad.parquet (1 of 2 rows are null)",
        ),
        (
            lambda: pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), "bad.parquet"),
            "write floating-point",
        ),
        (lambda: pq.write_table(pa.table({"a": [[1.0, None]]}), "bad.parquet"), "have shape 1 x 2"),
        (lambda: Path("bad.parquet").write_bytes(b"PAR1"), "cannot read scores from bad.parquet"),
    ],
)
def test_tables_without_a_score_for_everything_are_refused(
    refused: Refused, tiny: Path, make: Callable[[], object], expected: str
) -> None:
    make()
    words = ("submit", "lds", *AT, "--test", 3, "--by", "theirs=bad.parquet")
    assert expected in refused(*words)


def test_the_published_script_gives_the_same_number(infl: Infl, tiny: Path) -> None:
    """Of a file of scores, from the losses and subsets that benchmarks/lds.py writes."""
    scores = np.random.default_rng(1).normal(size=(Q, N))
    np.save("theirs.npy", scores)
    words = ("submit", "lds", *AT, *TESTS, "--subsets", 9, "--seeds", 2)
    run = infl(*words, "--by", "theirs.npy", "--json").json["run"]
    found = importlib.util.spec_from_file_location("lds_benchmark", BENCHMARKS / "lds.py")
    assert found is not None and found.loader is not None
    benchmark = importlib.util.module_from_spec(found)
    found.loader.exec_module(benchmark)
    benchmark.publish(str(tiny), run, Path("published"))
    script = [sys.executable, str(BENCHMARKS / "lds_of_file.py"), "published", "theirs.npy"]
    told = float(subprocess.run(script, capture_output=True, text=True, check=True).stdout)
    assert told == pytest.approx(rows(tiny / run, "summary")[0]["mean_lds"], abs=1e-6)
