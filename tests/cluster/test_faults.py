"""Kill processes in the middle of a run of the command line, and compare the stored bytes."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from infl_cluster.head import Head, recorded_head, stop_head
from influence_jobs.models.ffdnet import FFDNet
from influence_jobs.store import layout
from influence_jobs.store.documents import Entry, Status
from influence_jobs.store.lease import holder_of
from influence_jobs.store.run import Run
from influence_jobs.store.verify import find_damage

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

SHARDS = 12


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[None]:
    with (
        tempfile.TemporaryDirectory(prefix="infl-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("INFL_HOME", folder)
        yield
        head = recorded_head()
        if head is not None:
            stop_head(head)


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A request of twelve shards of about two seconds."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "ffdnet.pt"
    torch.save(FFDNet(color=True).state_dict(), path)
    words = f"submit grad-norms --layer 11 --checkpoint {path} --stride 17 --limit 3072"
    return words.split()


def infl(*words: str, runs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from infl_cli.main import main; main()", *words]
    return subprocess.run(
        [*command, "--runs", str(runs)], capture_output=True, text=True, timeout=600, check=False
    )


def run_of(runs: Path) -> Run:
    return Run.open(str(runs), next(runs.iterdir()).name)


def shards_done(run: Run) -> dict[str, Entry]:
    return {s: entry for s, entry in run.manifest.done().items() if s != layout.FINISH}


def stored(runs: Path) -> dict[str, bytes]:
    root = runs / run_of(runs).id / "data.zarr"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    pytest.fail(f"no {what} within {seconds} s")


def submit_and_wait_for_two_shards(request_: list[str], runs: Path) -> dict[str, Any]:
    result = infl(*request_, "--detach", "--workers", "2", runs=runs)
    assert result.returncode == 0, result.stderr
    wait_for(lambda: len(shards_done(run_of(runs))) >= 2, "two finished shards")
    return shards_done(run_of(runs))


def the_head() -> Head:
    head = recorded_head()
    assert head is not None
    return head


def is_done(runs: Path) -> bool:
    status = run_of(runs).read_json("status.json", Status)
    return status is not None and status["state"] == "done"


@pytest.fixture(scope="module")
def reference(request_: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same request in one process on all cores; each worker has one core."""
    runs = tmp_path_factory.mktemp("reference")
    result = infl(*request_, "--local", runs=runs)
    assert result.returncode == 0, result.stderr
    return stored(runs)


def assert_complete(runs: Path, reference: dict[str, bytes]) -> None:
    run = run_of(runs)
    assert len(shards_done(run)) == SHARDS
    assert find_damage(run).damaged == {}
    assert stored(runs) == reference


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("shard_size", ["256", "1024"])
def test_any_number_of_workers_and_any_shard_size_store_the_same_bytes(
    request_: list[str], tmp_path: Path, reference: dict[str, bytes], workers: str, shard_size: str
) -> None:
    result = infl(*request_, "--workers", workers, "--shard-size", shard_size, runs=tmp_path)
    assert result.returncode == 0, result.stderr
    assert stored(tmp_path) == reference


def test_a_killed_worker_is_replaced(
    request_: list[str], tmp_path: Path, reference: dict[str, bytes]
) -> None:
    done = submit_and_wait_for_two_shards(request_, tmp_path)
    worker = next(iter(done.values())).worker
    os.kill(int(worker.rpartition(":")[2]), signal.SIGKILL)
    wait_for(lambda: is_done(tmp_path), "finished run")
    assert_complete(tmp_path, reference)
    attempts = sorted(entry.attempt for entry in shards_done(run_of(tmp_path)).values())
    assert attempts == [1] * (SHARDS - 1) + [2]
    status = run_of(tmp_path).read_json("status.json", Status)
    assert status is not None
    assert status["retries"] == 1


def test_after_a_killed_driver_the_run_is_resumed(
    request_: list[str], tmp_path: Path, reference: dict[str, bytes]
) -> None:
    submit_and_wait_for_two_shards(request_, tmp_path)
    holder = holder_of(run_of(tmp_path).files)
    assert holder is not None
    os.kill(holder["pid"], signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(holder["pid"]), "dead driver")
    done = shards_done(run_of(tmp_path))
    result = infl("resume", run_of(tmp_path).id, runs=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_complete(tmp_path, reference)
    assert_not_computed_again(tmp_path, done)


def test_after_a_killed_head_the_run_is_resumed_on_a_new_one(
    request_: list[str], tmp_path: Path, reference: dict[str, bytes]
) -> None:
    submit_and_wait_for_two_shards(request_, tmp_path)
    head = the_head()
    supervisor = psutil.Process(head.pid)
    for process in [*supervisor.children(recursive=True), supervisor]:
        if process.is_running():
            os.kill(process.pid, signal.SIGKILL)
    holder = holder_of(run_of(tmp_path).files)
    if holder is not None:
        wait_for(lambda: not psutil.pid_exists(holder["pid"]), "dead driver")
    done = shards_done(run_of(tmp_path))
    result = infl("resume", run_of(tmp_path).id, runs=tmp_path)
    assert result.returncode == 0, result.stderr
    assert the_head().pid != head.pid
    assert_complete(tmp_path, reference)
    assert_not_computed_again(tmp_path, done)


def test_a_stopped_run_says_so_and_is_resumed(
    request_: list[str], tmp_path: Path, reference: dict[str, bytes]
) -> None:
    submit_and_wait_for_two_shards(request_, tmp_path)
    run_id = run_of(tmp_path).id
    assert infl("stop", run_id, runs=tmp_path).returncode == 0
    status = json.loads(infl("status", run_id, "--json", runs=tmp_path).stdout)
    assert status["status"] == "stopped"
    done = shards_done(run_of(tmp_path))
    assert len(done) < SHARDS
    assert infl("resume", run_id, runs=tmp_path).returncode == 0
    assert_complete(tmp_path, reference)
    assert_not_computed_again(tmp_path, done)


def assert_not_computed_again(runs: Path, before: dict[str, Any]) -> None:
    after = shards_done(run_of(runs))
    for shard, entry in before.items():
        assert (after[shard].attempt, after[shard].finished_at) == (
            entry.attempt,
            entry.finished_at,
        )


def test_ctrl_c_leaves_the_job_running(
    request_: list[str], tmp_path: Path, reference: dict[str, bytes]
) -> None:
    command = [sys.executable, "-c", "from infl_cli.main import main; main()", *request_]
    with subprocess.Popen(
        [*command, "--runs", str(tmp_path)], stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: any(tmp_path.iterdir()) and shards_done(run_of(tmp_path)), "shard")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on in the background" in said
    assert "infl stop" in said
    wait_for(lambda: is_done(tmp_path), "finished run")
    assert_complete(tmp_path, reference)
