"""What the commands do and print; all is computed in this process."""

import json
import re
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from infl_cluster import watch
from infl_cluster.inline import InlineBackend
from influence_jobs.datasets import mnist
from influence_jobs.errors import DataError
from influence_jobs.kinds import runner as runner_module
from influence_jobs.store import lease
from influence_jobs.store.run import Run
from influence_jobs.tasks.ffdnet import FFDNetTask

Infl = Callable[..., Any]

TRAIN = ("submit", "train", "--task", "digits:DigitsTask", "--epochs", "1", "--batch-size", "64")
NORMS = ("submit", "grad-norms", "--checkpoint", "train-digits")


@pytest.fixture
def planned(infl: Infl) -> Callable[..., dict[str, Any]]:
    """The plan of a request, with the run's id; nothing is computed."""

    def run(*words: object) -> dict[str, Any]:
        answer = infl(*words, "--dry-run", "--json")
        assert answer.code == 0, answer.err
        plan: dict[str, Any] = answer.json
        return plan

    return run


def test_from_a_training_to_its_norms(
    infl: Infl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = infl(*TRAIN, "--local")
    assert trained.code == 0
    run_id, path, figures, sure, table, hint = trained.out.splitlines()
    assert sure.startswith("  One training, from seed 0")
    assert re.fullmatch(r"  after epoch 1: train_loss \d\.\d+, accuracy 0\.\d+", figures)
    assert run_id.endswith(": done")
    assert Path(path.strip(), table.strip()).is_file()
    assert hint.startswith("next: infl ")
    # The suggested command works unchanged.
    words = hint.removeprefix("next: infl ").split()
    norms = infl(*words, "--local", "--json").json
    assert list(norms) == ["run", "path", "status", "arrays", "tables"]
    assert norms["status"] == "done"
    assert Path(norms["path"]) == tmp_path / "runs" / norms["run"]
    shapes = {"norms/conv1": [1500, 8], "norms/conv2": [1500, 16], "norms/head": [1500, 10]}
    assert {name: array["shape"] for name, array in norms["arrays"].items()} == shapes
    for array in norms["arrays"].values():
        stored = zarr.open_array(Path(norms["path"], array["path"]), mode="r")
        assert list(stored.shape) == array["shape"]
        assert str(stored.dtype) == array["dtype"] == "float32"
        assert np.isfinite(stored[:]).all()
    samples = pq.read_table(Path(norms["path"], norms["tables"]["samples"]))
    assert samples.column_names == ["sample", "label"]

    monkeypatch.setattr(InlineBackend, "run", lambda *_a, **_k: pytest.fail("computed again"))
    again = infl(*words, "--local", "--json")
    assert again.json == norms
    assert again.err.splitlines()[-1] == f"{norms['run']} is already done"


def test_checkpoints_of_chosen_epochs(infl: Infl, runs: Path) -> None:
    words = ("--layer", "head", "--local", "--json")
    first, second, both = (
        infl("submit", "grad-norms", "--checkpoint", f"train-digits@{which}", *more, *words).json
        for which, *more in (("1",), ("2",), ("all", "--combine", "keep"))
    )
    values = [
        zarr.open_array(Path(norms["path"], "data.zarr/norms/head"), mode="r")[:]
        for norms in (first, second, both)
    ]
    assert both["arrays"]["norms/head"]["shape"] == [2, 1500, 10]
    np.testing.assert_array_equal(values[2], np.stack(values[:2]))


def test_a_state_dict_file_is_a_checkpoint(
    infl: Infl, runs: Path, tmp_path: Path, finished_run: Run
) -> None:
    weights = next(runs.glob("train-*/checkpoints/epoch-0002.pt"))
    (tmp_path / "mine.pth").write_bytes(weights.read_bytes())
    words = ("--task", "digits:DigitsTask", "--layer", "head", "--local", "--json")
    of_file = infl("submit", "grad-norms", "--checkpoint", "mine.pth", *words).json
    of_run = runs / finished_run.id / "data.zarr/norms/head"
    assert of_run != Path(of_file["path"], "data.zarr/norms/head")
    np.testing.assert_array_equal(
        zarr.open_array(Path(of_file["path"], "data.zarr/norms/head"), mode="r")[:],
        zarr.open_array(of_run, mode="r")[:],
    )


def test_a_dry_run_writes_nothing_and_adds_up(
    infl: Infl, planned: Callable[..., dict[str, Any]], runs: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    words = (*NORMS, "--layer", "all", "--seed", "1", "--shard-size", "300")
    plan = planned(*words, "--workers", "2")
    assert sorted(tmp_path.rglob("*")) == before
    assert plan["shards"] == 3  # 1,500 rows in shards of two chunks
    assert plan["rows_per_shard"] == 512
    assert plan["samples"] == 1500
    assert plan["workers"] == 2
    assert plan["disk_bytes"] == 4 * 1500 * (8 + 16 + 10)
    assert plan["needs_first"] == []
    assert 1e8 < plan["memory_bytes_per_worker"] < 1e11
    assert plan["estimated_seconds"] == pytest.approx(1500 / plan["samples_per_second"])
    text = infl(*words, "--workers", "2", "--dry-run").out
    assert f"run         {plan['run']}\n" in text
    assert "shards      3 of up to 512 rows\n" in text
    done = infl(*words, "--local", "--json").json
    assert done["run"] == plan["run"]


def test_a_dry_run_counts_what_has_to_be_done_first(
    infl: Infl, planned: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    words = ("submit", "grad-norms", "--task", "digits:DigitsTask", "--layer", "1", "--epochs", "3")
    plan = planned(*words)
    (first,) = plan["needs_first"]
    assert plan["path"] == f"{tmp_path}/runs/{plan['run']}"
    assert first["run"] == planned(*TRAIN[:4], "--epochs", "3")["run"]
    assert first["samples"] == 3 * 1500
    both = first["estimated_seconds"] + plan["estimated_seconds"]
    assert plan["total_seconds"] == pytest.approx(both)
    text = infl(*words, "--dry-run").out
    assert f"done first  {first['run']}, about 0:" in text
    assert "\ntotal       about 0:" in text


def test_a_dry_run_of_one_piece(planned: Callable[..., dict[str, Any]]) -> None:
    assert planned(*TRAIN[:-1], "2000")["samples_per_second"] > 0


def test_a_batch_never_crosses_a_chunk(planned: Callable[..., dict[str, Any]], runs: Path) -> None:
    words = (*NORMS, "--layer", "1", "--batch-size")
    assert planned(*words, "1000")["batch_size"] == 256
    assert planned(*words, "100")["batch_size"] == 100


def test_a_run_keeps_its_plan(infl: Infl, runs: Path, finished_run: Run) -> None:
    words = (*NORMS, *("--layer", "1", "--layer", "2", "--layer", "3"), "--dry-run", "--json")
    kept = (
        f"{finished_run.id} keeps the plan that it began with: shards of 256 rows, batches of 64\n"
    )
    for more in (("--batch-size", "32"), ("--shard-size", "300")):
        answer = infl(*words, *more)
        assert answer.err.endswith(kept)
        assert (answer.json["batch_size"], answer.json["shards"]) == (64, 6)
    assert infl(*words, "--batch-size", "64", "--shard-size", "200").err == ""


def test_a_shard_size_that_is_rounded_is_told(infl: Infl, runs: Path) -> None:
    words = (*NORMS, "--layer", "1", "--dry-run")
    said = "has shards of 512 in place of --shard-size 300: a shard has whole chunks or blocks\n"
    assert said in infl(*words, "--shard-size", "300").err
    assert "in place of" not in infl(*words, "--shard-size", "512").err


def test_what_decides_the_id_of_a_run(
    planned: Callable[..., dict[str, Any]],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*words: object) -> object:
        return planned("submit", "train", *words)["run"]

    train = ("--task", "digits:DigitsTask")
    defaults = ("--option", "width=8", "--seed", "0", "--batch-size", "8", "--lr", "3e-3")
    assert run(*train) == run(*train, *defaults)
    assert len({run(*train, *more) for more in ((), ("--seed", "1"), ("--option", "width=4"))}) == 3

    norms = ("submit", "grad-norms", "--images", "images", "--patch-size", "32", "--limit", "4")
    first = planned(*norms, "--layer", "11")
    assert planned(*norms, "--layer", "main.29")["run"] == first["run"]
    assert (
        planned(*norms, "--layer", "11", "--stride", "25", "--sigma", "25")["run"] == first["run"]
    )
    written = planned(*norms, "--layer", "11", "--option", "sigma=25e0")  # as any other argument
    assert written["run"] == first["run"]
    other_sigma = planned(*norms, "--layer", "11", "--sigma", "15")
    assert other_sigma["run"] != first["run"]
    assert other_sigma["needs_first"][0]["run"] == first["needs_first"][0]["run"]
    other_stride = planned(*norms, "--layer", "11", "--stride", "8")
    assert other_stride["run"] != first["run"]
    assert other_stride["needs_first"][0]["run"] != first["needs_first"][0]["run"]
    # The run's id depends on the content of the data, not on their folder.
    images.rename(tmp_path / "samples-of-mine")
    moved = ["samples-of-mine" if word == "images" else word for word in norms]
    assert planned(*moved, "--layer", "11")["run"] == first["run"]
    (tmp_path / "samples-of-mine" / "b.png").unlink()
    fewer = planned(*moved, "--layer", "11")["run"]
    assert fewer != first["run"]
    monkeypatch.setenv("INFL_DATA", str(tmp_path))  # tasks that download nothing do not look at it
    assert planned(*moved, "--layer", "11")["run"] == fewer


def test_ffdnet_on_the_users_images(infl: Infl, images: Path, ffdnet_file: Path) -> None:
    (images / "broken.jpg").write_bytes(b"no picture")
    words = ("submit", "grad-norms", "--images", "images", "--patch-size", "32", "--stride", "8")
    more = ("--checkpoint", ffdnet_file, "--layer", "11", "--skip-unreadable", "--local")
    answer = infl(*words, *more, "--json")
    assert "left out: broken.jpg cannot be decoded\n" in answer.err
    assert answer.json["arrays"]["norms/main.29"]["shape"] == [12, 96]
    spec = json.loads(Path(answer.json["path"], "spec.json").read_text())
    assert spec["task"]["options"]["skip"] == ["broken.jpg"]
    assert spec["task"]["paths"] == {"images": str(images)}

    top = infl("top", "grad-norms-ffdnet", "--k", "2", "--json").json["top"]["norms/main.29"]
    stored = zarr.open_array(Path(answer.json["path"], "data.zarr/norms/main.29"), mode="r")[:]
    best = np.argsort(-stored.sum(1))[:2]
    assert [row["sample"] for row in top] == best.tolist()
    # Patches are numbered by image, then row by row of a grid of 3 x 2.
    assert [(row["file"], row["row"], row["column"]) for row in top] == [
        ("ab"[i // 6] + ".png", i % 6 // 2 * 8, i % 2 * 8) for i in best
    ]


def test_the_largest_norms(infl: Infl, runs: Path) -> None:
    stored = zarr.open_array(next(runs.glob("grad*/data.zarr/norms/conv2")), mode="r")[:]
    best = np.argsort(-stored[:, 2], kind="stable")[:3]
    words = ("top", "grad", "--k", "3", "--layer", "conv2", "--channel", "2")
    top = infl(*words, "--json").json["top"]
    assert list(top) == ["norms/conv2"]
    assert [row["sample"] for row in top["norms/conv2"]] == best.tolist()
    assert [row["norm"] for row in top["norms/conv2"]] == stored[best, 2].tolist()

    meaning, blank, heading, columns, *rows = infl(*words).out.splitlines()
    assert meaning.startswith("norms: L2 norm over the input axis of the weight gradient")
    assert meaning.endswith("of each sample's own loss, model in eval mode")
    assert (blank, heading) == ("", "layer conv2: largest norms of channel 2")
    assert columns.split() == ["sample", "label", "norm"]
    assert [int(row.split()[0]) for row in rows] == best.tolist()
    assert len({row.index(".") for row in rows}) == 1
    assert infl("top", "grad").out.count("\nlayer ") == 3


def test_runs_are_listed(infl: Infl, runs: Path, finished_run: Run) -> None:
    assert infl("runs", "--runs", "none").err.startswith("no runs in none yet: infl submit")
    ids = sorted(path.name for path in runs.iterdir())
    listed = infl("runs", "--json").json["runs"]
    assert [run["run"] for run in listed] == ids
    assert {run["status"] for run in listed} == {"done"}
    assert [run["samples_done"] for run in listed] == [1500, 3000]
    (runs / finished_run.id / "spec.json").write_text("{")
    listed = infl("runs", "--json").json["runs"]
    assert [run["status"] for run in listed] == ["damaged", "done"]


def test_tables_are_not_cut_on_narrow_terminals(
    infl: Infl, runs: Path, finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    heading, first, _ = infl("runs").out.splitlines()
    assert first.startswith(f"{finished_run.id}  done    100 %  20")
    assert heading.index("started") == first.index("20")


def test_status_of_a_finished_run(infl: Infl, runs: Path, finished_run: Run) -> None:
    assert infl("status", "grad").out == (
        f"run             {finished_run.id}\n"
        f"path            {runs / finished_run.id}\n"
        "status          done\n"
        "samples         1,500 of 1,500\n"
        "shards          6 of 6\n"
        f"shards by node  {socket.gethostname()} 6\n"
    )
    status = infl("status", finished_run.id.rpartition("-")[2], "--json").json
    assert status["progress"]["shards_done"] == 6
    assert status["arrays"]["norms/head"]["shape"] == [1500, 10]
    assert infl("status", "grad", "--follow").out == infl("status", "grad").out
    assert "6 of 6 shards to do" in infl("logs", "grad").out


def test_damage_is_found_and_mended(infl: Infl, runs: Path, finished_run: Run) -> None:
    good = f"{finished_run.id}: 6 of 6 shards are done and good\n"
    assert infl("verify", "grad").out == good
    chunk = runs / finished_run.id / "data.zarr/norms/conv2/c/0/0"
    before = chunk.read_bytes()
    chunk.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))

    found = infl("verify", "grad", "--json")
    assert found.code == 2
    assert list(found.json["damaged"]) == ["000000000-000000256"]
    assert (found.json["good"], found.json["not_done"]) == (5, 0)
    repair = f"infl verify {finished_run.id} --repair, then infl resume {finished_run.id}"
    assert found.err == f"error: 1 shard is damaged: {repair}\n"
    mended = infl("verify", "grad", "--repair")
    assert mended.code == 0
    assert mended.err.endswith(f"1 shard is to be computed again: infl resume {finished_run.id}\n")
    assert infl("resume", "grad", "--local").code == 0

    assert infl("verify", "grad").out == good
    assert chunk.read_bytes() == before


def test_lost_records_are_counted_as_not_done(infl: Infl, runs: Path, finished_run: Run) -> None:
    for name in ("000000000-000000256", "000000256-000000512"):
        (runs / finished_run.id / "manifest" / f"{name}.json").unlink()
    assert infl("verify", "grad", "--repair").code == 0
    stopped = infl("status", "grad", "--json").json["progress"]
    assert (stopped["state"], stopped["shards_done"], stopped["shards_total"]) == ("stopped", 4, 6)
    assert stopped["units_done"] == 1000
    assert infl("resume", "grad", "--local").code == 0
    assert infl("verify", "grad").out.endswith("6 of 6 shards are done and good\n")


def test_a_run_that_goes_on_with_other_versions_says_so(
    infl: Infl, runs: Path, finished_run: Run
) -> None:
    run = Run.open(str(runs), finished_run.id)
    first, second, *_ = run.manifest.done().values()
    run.manifest.write(replace(first, software={**first.software, "torch": "1.0"}))
    run.manifest.write(replace(second, state="running"))
    run.files.delete("status.json")
    resumed = infl("resume", "grad", "--local")
    assert resumed.code == 0
    now = first.software["torch"]
    assert f"{run.id} goes on with torch {now}; some of its shards have 1.0\n" in resumed.err
    assert infl("verify", "grad").out.strip().endswith("6 of 6 shards are done and good")


def test_who_takes_over_from_another_host_says_what_it_waits_for(
    infl: Infl, runs: Path, finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "WATCH_S", 0.0)
    run = Run.open(str(runs), finished_run.id)
    holder = {"owner": "x", "host": "elsewhere", "pid": 7, "process_started": 0.0, "beat": 0.0}
    run.write_json("lease.json", {**holder, "beat": time.time() - 100})
    run.files.delete("status.json")
    resumed = infl("resume", "grad", "--local")
    assert resumed.code == 0
    told = f"{run.id} was last computed by process 7 on elsewhere: it goes on here if that"
    assert f"{told} process writes nothing for 12 s\n" in resumed.err


@pytest.mark.parametrize("record", ["0*.json", "finish.json"])
@pytest.mark.parametrize("lost", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_done_run_without_a_record_fails_until_it_is_repaired(
    infl: Infl, runs: Path, finished_run: Run, lost: Callable[[Path], Any], record: str
) -> None:
    """The summary of a run says that all is done as long as no record is gone."""
    run = Run.open(str(runs), finished_run.id)
    lost(next(Path(run.files.url, "manifest").glob(record)))
    found = infl("verify", "grad")
    assert found.code == 2
    assert f"{run.id} is said to be done, but 1 of its shards have no record: infl ver" in found.err
    assert "1 shard is to be computed again" in infl("verify", "grad", "--repair").err
    assert infl("resume", "grad", "--local").code == 0
    assert infl("verify", "grad").code == 0
    assert run.digest() == finished_run.digest()


def test_repairing_a_good_run_changes_nothing(infl: Infl, runs: Path, finished_run: Run) -> None:
    assert infl("verify", "grad", "--repair").code == 0
    assert infl("status", "grad", "--json").json["status"] == "done"


def test_after_ctrl_c_a_run_goes_on_where_it_was(
    infl: Infl, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = runner_module.ShardRunner.run, []

    def interrupted_at_the_third(self: runner_module.ShardRunner, shard: Any) -> Any:
        calls.append(shard.id)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(self, shard)

    monkeypatch.setattr(runner_module.ShardRunner, "run", interrupted_at_the_third)
    words = (*NORMS, "--layer", "head", "--precision", "float64", "--local")
    answer = infl(*words)
    assert (answer.code, answer.out) == (130, "")
    run_id = answer.err.split()[-2]
    assert answer.err.endswith(f"stopped; what is finished is kept: infl resume {run_id} --local\n")
    stopped = infl("status", run_id, "--json").json["progress"]
    assert (stopped["state"], stopped["shards_done"]) == ("stopped", 2)
    assert f"next            infl resume {run_id}\n" in infl("status", run_id).out

    monkeypatch.setattr(watch, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(watch, "POLL_S", 0.01)
    resumed = infl("resume", run_id, "--local", "--json")
    assert resumed.code == 0
    assert resumed.json["status"] == "done"
    assert len(calls) == 3 + 4
    # Without a terminal, progress is printed as lines to standard error.
    assert resumed.out.count("\n") == 1
    progress = re.compile(r"(grad-norms|train)-digitstask-\w+ \d+%  [\d,]+ of [\d,]+ samples.*")
    assert all(progress.fullmatch(line) for line in resumed.err.splitlines())
    assert f"{run_id} 100%  1,500 of 1,500 samples" in resumed.err


@pytest.mark.timeout(120)
def test_a_run_here_ends_when_it_is_done(infl: Infl, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for the next look at its progress."""
    monkeypatch.setattr(watch, "POLL_S", 3600.0)
    assert infl(*TRAIN, "--local").code == 0


def test_a_failed_run_tells_why(infl: Infl, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TensorDataset.__getitem__

    def one_bad_sample(self: TensorDataset, index: int) -> Any:
        if index == 701:
            raise DataError("sample 701 is out of order")
        return original(self, index)

    words = (*NORMS, "--layer", "head", "--precision", "float64", "--local")
    with monkeypatch.context() as patch:
        patch.setattr(TensorDataset, "__getitem__", one_bad_sample)
        failed = infl(*words)
    assert (failed.code, failed.out) == (2, "")
    why = "1 of 6 shards failed, the first: sample 701 is out of order"
    run_id = failed.err.split()[-2]
    hint = f"infl logs {run_id}; infl resume {run_id} --local"
    assert failed.err == f"error: {why} ({hint})\n"
    status = infl("status", run_id).out
    assert "shards                     5 of 6\n" in status
    assert f"message                    {why}\n" in status
    assert "shard 000000512-000000768  sample 701 is out of order\n" in status
    assert "sample 701" in infl("logs", run_id).out
    assert infl(*words).code == 0


class Same(nn.Module):
    """A denoiser that changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, noisy: Tensor, _sigma: Tensor) -> Tensor:
        return noisy


def test_denoised_images_are_written_in_true_colours(
    infl: Infl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FFDNetTask, "network", Same)
    torch.save(Same().state_dict(), tmp_path / "same.pth")
    clean = np.empty((8, 9, 3), dtype=np.uint8)
    clean[:] = (200, 100, 50)
    for name in ("a[b].png", "deep/a.jpg"):
        (tmp_path / "clean" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(clean).save(tmp_path / "clean" / name, quality=100)
    words = ("denoise", "clean", "--checkpoint", "same.pth", "--out", "out")

    answer = infl(*words, "--sigma", "0", "--json").json
    assert answer["images"][0] == {"file": "a[b].png", "noisy_psnr": None, "psnr": None}
    written = np.asarray(Image.open(tmp_path / "out" / "a[b].png"))
    np.testing.assert_array_equal(written, clean)
    assert (tmp_path / "out" / "deep" / "a.jpg.png").is_file()

    heading, *rows = infl(*words).out.splitlines()
    assert heading.split() == ["file", "noisy", "dB", "denoised", "dB"]
    assert [row.split()[0] for row in rows] == ["a[b].png", "deep/a.jpg", "mean"]
    assert float(rows[0].split()[1]) == pytest.approx(20 * np.log10(255 / 25), abs=0.5)


def test_mnist_is_checked(infl: Infl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "_all_right", lambda raw: raw == tmp_path / "data/MNIST/raw")
    answer = infl("data", "mnist", "--data-dir", tmp_path / "data")
    assert answer.out == f"MNIST is in {tmp_path}/data and its checksums are right\n"
