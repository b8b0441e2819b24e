"""Runs of format 1 (tests/runs_of_format_1) open, verify, resume, report, and serve new runs."""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import influence_jobs
from infl_cluster.inline import InlineBackend
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.paper.spec import PaperSpec
from influence_jobs.store.run import Run
from influence_jobs.training.train import Trainer

Infl = Callable[..., Any]

KEPT = Path(__file__).parents[1] / "runs_of_format_1"
TASK_SHA256 = "5c1b18efd19408f436c189ba0cabbe23f7992f74f6a27c37ed1cc3f94514554b"
TRAIN = "train-tiny-616d2a2ad7d9"
NORMS = "grad-norms-tiny-e6033dcc7835"
INFLUENCE = "influence-tiny-9ae2bd2592df"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of the archive. Do not write."""
    folder = tmp_path_factory.mktemp("format_1")
    with tarfile.open(KEPT / "runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def asked(unpacked: Path) -> dict[str, list[str]]:
    """The words of the command that made each run, by run id."""
    lines = json.loads((unpacked / "asked.json").read_text())
    return {run: line.split() for run, line in lines.items()}


@pytest.fixture(scope="module")
def half(unpacked: Path) -> dict[str, str]:
    """The runs that were stopped half way, by kind."""
    found: dict[str, str] = json.loads((unpacked / "half.json").read_text())
    return found


@pytest.fixture
def kept(unpacked: Path, tmp_path: Path, infl: Infl, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runs, their task and its files, copied into the working directory of `infl`."""
    monkeypatch.syspath_prepend(KEPT)
    shutil.copytree(unpacked, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`RUN SHARD` of every shard that is computed from now on."""
    names: list[str] = []
    run = InlineBackend.run

    def noting(self: InlineBackend, of: Run, shards: Any, **more: Any) -> None:
        names.extend(f"{of.id} {shard.id}" for shard in shards)
        run(self, of, shards, **more)

    monkeypatch.setattr(InlineBackend, "run", noting)
    return names


def run_ids(runs: Path) -> list[str]:
    return sorted(path.parent.name for path in runs.glob("*/spec.json"))


def arrays_of(runs: Path, run_id: str) -> dict[str, npt.NDArray[Any]]:
    run = Run.open(str(runs), run_id)
    return {name: np.asarray(run.array(name)[:]) for name in run.array_names()}


def require_same(found: dict[str, Any], expected: dict[str, Any], of_largest: float = 1e-6) -> None:
    """Equal up to rounding: another CPU may round otherwise."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        atol = of_largest * float(np.abs(values).max(initial=1.0))
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=atol, err_msg=name)


def test_the_task_is_the_file_that_the_runs_are_of() -> None:
    found = hashlib.sha256((KEPT / "tiny_task.py").read_bytes()).hexdigest()
    assert found == TASK_SHA256, "tiny_task.py was edited: restore it byte for byte"


def test_there_is_a_run_of_every_kind(unpacked: Path) -> None:
    kinds = {run.split("-tiny-")[0] for run in run_ids(unpacked / "runs")}
    assert kinds >= {
        "train", "grad-norms", "s-test", "influence", "attribution", "baseline",
        "ablation", "lds", "stability", "paper",
    }  # fmt: skip


def test_every_run_opens_and_says_how_far_it_is(
    infl: Infl, kept: Path, half: dict[str, str]
) -> None:
    listed = infl("runs", "--json").json["runs"]
    assert sorted(row["run"] for row in listed) == run_ids(kept)
    assert {row["run"] for row in listed if row["status"] != "done"} == {*half.values()}
    assert {row["status"] for row in listed} == {"done", "stopped"}
    for run_id in run_ids(kept):
        # The name of the folder is still the hash of the request.
        run = Run.open(str(kept), run_id)
        assert all(entry.spec == run.spec.hash for entry in run.manifest.entries())
        assert infl("status", run_id, "--json").json["run"] == run_id


def test_every_run_verifies(infl: Infl, kept: Path, half: dict[str, str]) -> None:
    for run_id in run_ids(kept):
        found = infl("verify", run_id, "--json")
        assert found.code == 0, found.err
        assert found.json["damaged"] == {}
        whole = run_id not in half.values()
        assert (found.json["not_done"] == 0) == whole, run_id


def then(words: list[str]) -> list[str]:
    """What a request of then has to say today, as the defaults of requests are others."""
    # EK-FAC's targets were sampled, and lambda was .04 of the largest eigenvalue.
    said = ["--targets", "sampled"] if "ek-fac" in words else []
    inverts = "helpful" in words or (
        words[1] in ("s-test", "influence") and "--s-test" not in words
    )
    return [*said, "--damping-share", "0.04"] if inverts and "--damping" not in words else said


def test_the_same_request_finds_every_finished_run(
    infl: Infl, kept: Path, asked: dict[str, list[str]], half: dict[str, str], computed: list[str]
) -> None:
    """Also a request that needs an old training, and one of a user's task."""
    before = run_ids(kept)
    whole = [run_id for run_id in asked if run_id not in half.values()]
    for run_id in [run_id for run_id in whole if not run_id.startswith("train-tiny")]:
        again = infl(*asked[run_id], *then(asked[run_id]), "--local", "--json")
        assert again.code == 0, again.err
        assert again.json["run"] == run_id
        assert f"{run_id} is already done\n" in again.err
    assert computed == []
    assert run_ids(kept) == before


def test_paths_of_a_tasks_files_are_still_no_part_of_the_request(
    infl: Infl, kept: Path, asked: dict[str, list[str]], computed: list[str]
) -> None:
    words = (*asked[NORMS], "--folder", "elsewhere")
    assert infl(*words, "--local", "--json").json["run"] == NORMS
    assert computed == []
    assert Run.open(str(kept), NORMS).spec.task.paths == {"folder": str(kept.parent / "elsewhere")}


def test_a_half_done_run_is_resumed_and_nothing_is_computed_twice(
    infl: Infl, kept: Path, half: dict[str, str], computed: list[str]
) -> None:
    todo = {
        "grad-norms": ["000000256-000000512", "000000512-000000600"],
        "lds": ["000001-000002", "000002-000003"],
        "train": ["all"],
    }
    expected = dict(np.load(kept.parent / "resumed.npz"))
    for run_id in half.values():
        resumed = infl("resume", run_id, "--local", "--json")
        assert resumed.code == 0, resumed.err
        assert resumed.json["status"] == "done"
        assert infl("verify", run_id).code == 0
    assert computed == [f"{half[kind]} {shard}" for kind in half for shard in todo[kind]]
    found = {
        f"{kind}/{name}": values
        for kind, run_id in half.items()
        for name, values in arrays_of(kept, run_id).items()
    }
    weights = torch.load(kept / half["train"] / "checkpoints/epoch-0004.pt", weights_only=True)
    found |= {f"train/{name}": tensor.numpy() for name, tensor in weights.items()}
    require_same(found, expected)


def test_a_stopped_training_goes_on_from_its_saved_state(
    infl: Infl, kept: Path, half: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []
    step = Trainer.step

    def noting(self: Trainer) -> float | None:
        epochs.append(self.epoch)
        return step(self)

    monkeypatch.setattr(Trainer, "step", noting)
    assert infl("resume", half["train"], "--local").code == 0
    assert epochs == [2, 2, 2, 3, 3, 3]  # of 0 to 3, in steps of 8 of 24 samples


# Where conjugate gradients reach their tolerance, another CPU may take a step less.
@pytest.mark.parametrize(("run_id", "of_largest"), [(NORMS, 1e-6), (INFLUENCE, 5e-4)])
def test_runs_computed_again_from_the_old_weights_have_the_same_numbers(
    run_id: str, of_largest: float,
    infl: Infl, kept: Path, asked: dict[str, list[str]], computed: list[str],
) -> None:  # fmt: skip
    shutil.copytree(kept / TRAIN, kept.parent / "anew" / TRAIN)
    done = infl(*asked[run_id], *then(asked[run_id]), "--runs", "anew", "--local", "--json")
    assert done.code == 0, done.err
    assert done.json["run"] == run_id
    assert computed
    assert not any(TRAIN in name for name in computed)
    found, expected = (arrays_of(root, run_id) for root in (kept.parent / "anew", kept))
    require_same(found, expected, of_largest)


def test_new_requests_use_the_old_runs(infl: Infl, kept: Path, computed: list[str]) -> None:
    at = ("--checkpoint", TRAIN, "--test", "1")
    random = infl("submit", "baseline", "--method", "random", *at, "--local", "--json").json["run"]
    influence = infl("submit", "influence", *at, "--local", "--json").json["run"]
    spec = Run.open(str(kept), influence).spec
    assert isinstance(spec, InfluenceSpec)
    s_test = spec.s_tests[0].run_id
    assert [name.split()[0] for name in computed] == [random, s_test, influence]


def test_new_experiments_use_the_models_that_old_ones_trained(
    infl: Infl, kept: Path, computed: list[str]
) -> None:
    before = {path.name for path in kept.glob("retrained-*/manifest/*")}
    words = ("--checkpoint", TRAIN, "--test", "0", "--test", "3", "--by", "random")
    grid = infl("submit", "ablation", *words, "--k", "2", "--k", "3", "--local", "--json")
    assert grid.code == 0, grid.err
    assert {name.split()[0] for name in computed} == {grid.json["run"]}
    after = {path.name for path in kept.glob("retrained-*/manifest/*")}
    assert after > before
    assert len(after - before) == 2 * 2  # two queries, relabelled or removed, at k = 3 only


def test_every_kind_is_reported(infl: Infl, kept: Path, half: dict[str, str]) -> None:
    by_kind: dict[str, list[str]] = {}
    for run_id in run_ids(kept):
        if run_id not in half.values():
            by_kind.setdefault(run_id.rsplit("-", 2)[0], []).append(run_id)
    for kind, all_of_it in by_kind.items():
        runs = all_of_it[: 2 if kind == "influence" else 1]
        said = infl("report", *runs, "--out", f"page-{kind}")
        assert said.code == 0, said.err
        page = Path(said.out.splitlines()[0]).read_text()
        for run_id in runs:
            spec = Run.open(str(kept), run_id).spec
            # The page of a paper run shows its parts.
            shown = [p.run_id for p in spec.parts] if isinstance(spec, PaperSpec) else [run_id]
            assert all(one in page for one in shown)


def test_the_samples_that_come_first(infl: Infl, kept: Path) -> None:
    norms = infl("top", NORMS, "--k", "3", "--json")
    assert norms.code == 0, norms.err
    scores = infl("top", INFLUENCE, "--k", "3", "--test", "3", "--json")
    assert scores.code == 0, scores.err
    values = arrays_of(kept, INFLUENCE)["scores"][1]
    best = influence_jobs.open_run(kept / INFLUENCE).top_k(1, test=3, side="helpful").to_pylist()[0]
    assert best["sample"] == values.argmax()
    assert best["score"] == pytest.approx(values.max())


def test_results_in_python(kept: Path, half: dict[str, str]) -> None:
    results = influence_jobs.open_run(kept / INFLUENCE)
    assert results.state == "done"
    scores = results["scores"]
    assert scores.dims == ("query", "sample")
    assert scores.shape == (2, 24)
    assert scores.test.values.tolist() == [0, 3]
    assert np.isfinite(scores.values).all()
    assert results.figures
    assert influence_jobs.open_run(kept / half["grad-norms"]).state == "stopped"
