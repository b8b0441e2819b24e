"""How a worker reports errors."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from obstore.exceptions import GenericError

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.errors import DataError, ModelError, RuntimeFault, SpecError, StoreError
from influence_jobs.jobs.base import Shard
from influence_jobs.kinds import runner as runner_module
from influence_jobs.kinds.grad_norms.job import GradNormsJob
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.runner import ShardRunner
from influence_jobs.store import layout
from influence_jobs.store.run import Run

OUT_OF_MEMORY = (
    "out of memory: choose a smaller --batch-size, fewer layers (--layer), fewer queries, or a "
    "machine or GPU with more memory"
)
SHARD = Shard("000000000-000000256", 0, 256)


@pytest.fixture
def run(tmp_path: Path, trained_root: Path, grad_norms_spec: GradNormsSpec) -> Run:
    shutil.copytree(trained_root, tmp_path / "runs")
    return Run.create(str(tmp_path / "runs"), grad_norms_spec)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def run(*_: object) -> None:
        raise error

    monkeypatch.setattr(GradNormsJob, "run", run)


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (DataError("sample 7 is not finite"), "user", "sample 7 is not finite"),
        (ModelError("no such layer"), "fatal", "no such layer"),
        (SpecError("no such option"), "fatal", "no such option"),
        (StoreError("the plan is damaged"), "fatal", "the plan is damaged"),
        (OSError(errno.EIO, "read error"), "transient", "OSError: [Errno 5] read error"),
        (OSError(errno.ENOSPC, "full"), "fatal", "the disk is full: make room and resume"),
        (PermissionError(errno.EACCES, "denied"), "fatal", "PermissionError: [Errno 13] denied"),
        (GenericError("slow down\nDebug source: x"), "transient", "GenericError: slow down"),
        (
            torch.AcceleratorError(
                "CUDA error: an illegal memory access\nCUDA kernel errors might"
            ),
            "worker",
            "the GPU failed (CUDA error: an illegal memory access): resume the run",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
            "worker",
            "the GPU failed (CUDA error: CUBLAS_STATUS_EXECUTION_FAILED): resume the run",
        ),
        (
            torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with"),
            "worker",
            (
                "the GPU failed (CUDA error: device-side assert triggered), as it does where a "
                "label, a token or an index is out of range: try the samples with --device cpu, or "
                "resume the run"
            ),
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "user",
            OUT_OF_MEMORY,
        ),
        (KeyError("a"), "user", "KeyError: 'a'"),
    ],
)
def test_errors_are_told_in_one_line_and_sorted_by_whether_to_try_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str, line: str
) -> None:
    fail_with(monkeypatch, error)
    receipt = ShardRunner(run.root, run.id).run(SHARD)
    # An error that nobody foresaw names the last line outside this package: here `fail_with`.
    said, place, _ = receipt.error.partition(f" ({__file__}, line ")
    assert (receipt.status, receipt.kind, said) == ("failed", kind, line)
    assert bool(place) == line.startswith(f"{type(error).__name__}: ")


def test_a_gpu_that_failed_is_asked_whatever_else_was_raised(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(device: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    runner = ShardRunner(run.root, run.id)
    runner._job.device = torch.device("cuda")
    for error, kind in (
        (ModelError("it differs from plain autograd"), "fatal"),
        (torch.OutOfMemoryError("CUDA out of memory."), "user"),
    ):
        fail_with(monkeypatch, error)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        assert runner.run(SHARD).kind == kind
    monkeypatch.setattr(torch.cuda, "synchronize", failed)
    assert runner.run(SHARD).kind == "user"  # memory is had anew, and nothing is asked
    fail_with(monkeypatch, ModelError("it differs from plain autograd"))
    receipt = runner.run(SHARD)
    assert receipt.kind == "worker"
    assert receipt.error == (
        "the GPU failed (CUDA error: an illegal memory access was encountered): resume the run"
    )


def test_the_traceback_of_an_unexpected_error_is_kept_in_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, ZeroDivisionError("one by nought"))
    ShardRunner(run.root, run.id).run(SHARD)
    text = run.files.read(f"{layout.LOGS}/shard-{SHARD.id}.log").decode()
    assert text.startswith("Traceback")
    assert text.endswith("ZeroDivisionError: one by nought\n")


def test_errors_meant_for_the_user_leave_no_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, DataError("sample 7 is not finite"))
    ShardRunner(run.root, run.id).run(SHARD)
    assert run.files.names(layout.LOGS) == []


def test_a_model_that_does_not_fit_ends_the_run_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, ModelError("no such layer"))
    with pytest.raises(RuntimeFault, match=r"^no such layer$"):
        drive(run.root, run.id, InlineBackend(), shard_rows=256)
    assert len(run.manifest.entries()) == 1


def test_a_gpu_that_failed_ends_the_run_of_its_only_process(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, RuntimeError("CUDA error: unspecified launch failure"))
    with pytest.raises(RuntimeFault, match=r"^the GPU failed .*: resume the run$"):
        drive(run.root, run.id, InlineBackend(), shard_rows=256)
    assert len(run.manifest.entries()) == 1


def test_a_worker_that_finds_other_data_refuses(
    run: Run, monkeypatch: pytest.MonkeyPatch, grad_norms_spec: GradNormsSpec
) -> None:
    task = type(GradNormsJob(run, device=torch.device("cpu")).task)
    monkeypatch.setattr(task, "fingerprint", lambda _: "n=7")
    with pytest.raises(
        SpecError, match=r"the training data of digits:DigitsTask are not those .*\(n=7 instead of"
    ):
        ShardRunner(run.root, run.id)


def test_many_workers_write_their_progress_less_often(
    grad_norms_spec, trained_root, tmp_path, monkeypatch
):
    shutil.copytree(trained_root, tmp_path / "runs")
    run = Run.create(str(tmp_path / "runs"), grad_norms_spec)
    clock, written = [0.0], {}
    monkeypatch.setattr("influence_jobs.kinds.runner.time.monotonic", lambda: clock[0])
    for workers in (1, 64, 512):
        progress = runner_module._Progress(
            run, Shard("a", 0, 1), ShardRunner(run.root, run.id, workers=workers)._progress_every_s
        )
        writes = []
        monkeypatch.setattr(run, "write_json", lambda name, value, to=writes: to.append(value))
        for second in range(640):
            clock[0] += 0.125
            progress(second)
        written[workers] = len(writes)
    assert 78 <= written[1] <= 80  # once a second
    assert 78 <= written[64] <= 80
    assert 9 <= written[512] <= 10  # 64 a second of all together


def test_a_worker_of_many_looks_for_a_batch_size_as_long_as_its_own_part_repays(
    run: Run, monkeypatch
):
    """They all begin at once: what one may spend of the whole run, many would spend each."""
    given = []
    monkeypatch.setattr(runner_module, "settle", lambda job, units: given.append(units))
    drive(run.root, run.id, InlineBackend())
    for workers in (1, 4, 512):
        ShardRunner(run.root, run.id, workers=workers)
    assert given == [1500, 1500, 375, 3]
