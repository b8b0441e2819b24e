"""The batch size of a run that was submitted without one."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.jobs import automatic
from influence_jobs.jobs.automatic import Choice, chosen, settle
from influence_jobs.kinds import open_job
from influence_jobs.report.made import made
from influence_jobs.store.run import Run

UNITS = 10**6


class Probed:
    """A job whose batches have some speeds and take some memory; others do not fit."""

    chunk_rows = 512

    def __init__(self, own: int, speeds: dict[int, float], bytes_per_sample: int) -> None:
        self.batch_size, self.speeds, self.each = own, speeds, bytes_per_sample
        self.device = torch.device("cpu")
        self.batching = self
        self.size, self.tried = own, list[int]()

    def apart(self) -> "Probed":
        return self

    def probe(self) -> Iterator[float]:
        yield 1.0


def measured(monkeypatch: pytest.MonkeyPatch, job: Probed, *, free: int, units: int) -> Choice:
    def rate(_pieces: Any, _seconds: float) -> float:
        job.tried.append(job.size)
        if job.size not in job.speeds:
            raise torch.OutOfMemoryError
        return job.speeds[job.size]

    class Peak:
        def __init__(self, _device: Any) -> None:
            self.bytes = job.size * job.each

    monkeypatch.setattr(automatic, "samples_per_second", rate)
    monkeypatch.setattr(automatic, "free_bytes", lambda _device: free)
    monkeypatch.setattr(automatic, "Peak", Peak)
    return chosen(job, units)  # type: ignore[arg-type]


ALIKE = {2**k: 100.0 for k in range(12)}


@pytest.mark.parametrize(
    ("own", "speeds", "free", "tried", "size"),
    [
        # The first size that is slower ends it.
        (
            32,
            ALIKE | {64: 180, 128: 300, 256: 290, 512: 999},
            10**9,
            [8, 16, 32, 64, 128, 256],
            128,
        ),
        # A chunk ends it.
        (256, ALIKE | {512: 200}, 10**9, [8, 16, 32, 64, 128, 256, 512], 512),
        # Running out of memory ends it.
        (32, {8: 9, 16: 50, 32: 100, 64: 180}, 10**9, [8, 16, 32, 64, 128], 64),
        # What is free ends it: 128 samples would take more than half of it.
        (32, ALIKE | {64: 180, 128: 999}, 2 * 100, [8, 16, 32, 64], 64),
        # A smaller one is best; one that is hardly faster is not taken.
        (32, ALIKE | {16: 130, 64: 90}, 10**9, [8, 16, 32, 64], 16),
        (32, ALIKE | {16: 104, 64: 108, 128: 90}, 10**9, [8, 16, 32, 64, 128], 32),
        # The own does not fit: what is free says so before it is tried.
        (64, ALIKE, 2 * 20, [8, 16], 16),
        # Not even the smallest fits: the run will halve.
        (64, {}, 10**9, [8], 64),
        (1, {1: 10, 2: 30}, 10**9, [1, 2, 4], 2),
    ],
)
def test_sizes_are_doubled_while_they_fit_and_are_faster(
    monkeypatch: pytest.MonkeyPatch,
    own: int,
    speeds: dict[int, float],
    free: int,
    tried: list[int],
    size: int,
) -> None:
    job = Probed(own, speeds, bytes_per_sample=1)
    assert measured(monkeypatch, job, free=free, units=UNITS).size == size
    assert job.tried == tried


def test_a_short_run_keeps_its_own_size_if_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Probed(64, ALIKE | {128: 999}, bytes_per_sample=1)
    assert measured(monkeypatch, job, free=10**9, units=1000).size == 64
    assert job.tried == [8]
    tight = Probed(64, ALIKE, bytes_per_sample=1)
    assert measured(monkeypatch, tight, free=2 * 40, units=1000).size == 32
    assert tight.tried == [8, 16, 32]


def test_a_probe_takes_a_small_part_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of samples that take a second each, 200 are not worth batches of 8, 16, 32 and 64."""
    slow = dict.fromkeys(ALIKE, 1.0)
    for units, tried in ((200, [8]), (1000, [8, 16]), (10**4, [8, 16, 32, 64, 128])):
        job = Probed(64, slow, 1)
        assert measured(monkeypatch, job, free=10**9, units=units).size == 64
        assert job.tried == tried


def test_why_a_size_was_taken_is_said() -> None:
    assert Choice(64, {64: 5.0}).said(64) == ""
    assert Choice(128, {64: 5.0, 128: 10.0}).said(64) == "2.00 times as fast as 64 (probed)"
    assert Choice(16, {8: 5.0, 16: 5.0}).said(64) == "64 do not fit into memory (probed)"
    assert Choice(16).said(64) == "as an earlier run found on this device, in place of 64"


@pytest.fixture
def run(tmp_path: Path, trained_root: Path, grad_norms_spec, monkeypatch) -> Run:
    monkeypatch.setenv("INFL_HOME", str(tmp_path / "home"))
    shutil.copytree(trained_root, tmp_path / "runs")
    return Run.create(str(tmp_path / "runs"), grad_norms_spec)


def test_the_first_worker_chooses_for_all_and_for_later_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = iter([64, 32, 128, 256])
    rates: dict[int, float] = {}  # of a probe that failed
    monkeypatch.setattr(automatic, "chosen", lambda job, units: Choice(next(sizes), rates))
    settle(open_job(run), 1500)
    run.files.delete("batch.json")
    rates[1] = 1.0
    drive(run.root, run.id, InlineBackend())
    assert {e.batch_size for e in run.manifest.entries() if e.batch_size} == {32}
    assert made(run).batches == "32 samples, where the task's own number is 64"
    later = open_job(run)
    settle(later, 1500)
    assert later.batching.size == 32
    run.files.delete("batch.json")  # as of another run
    other = open_job(run)
    settle(other, 1500)
    assert other.batching.size == 32  # remembered on this machine
    shutil.rmtree(tmp_path / "home")
    run.files.delete("batch.json")
    anew = open_job(run)
    settle(anew, 1500)
    assert anew.batching.size == 128


def test_a_size_that_was_asked_for_is_not_probed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(job: Any, units: int) -> Choice:
        raise AssertionError

    monkeypatch.setattr(automatic, "chosen", never)
    drive(run.root, run.id, InlineBackend(), batch_size=50)
    assert made(run).batches == "50 samples"
    assert run.read_json("batch.json", dict) is None


def test_a_real_probe_leaves_the_job_as_it_was(run: Run) -> None:
    job: Any = open_job(run)
    choice = chosen(job, 10**9)
    assert choice.size in choice.rates
    assert set(choice.rates) >= {8, 16, 32, 64}
    assert "batching" not in vars(job)
    assert "_built" not in vars(job)  # the probe had a model of its own
