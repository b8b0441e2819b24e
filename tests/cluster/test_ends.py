"""How the end of a driver, a worker or Ray is told."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from infl_cluster import head as heads
from infl_cluster import pool, ray_job
from infl_cluster import status as status_module
from infl_cluster import watch as watch_module
from infl_cluster.client import JobClient
from infl_cluster.driver import stop_on_sigterm
from infl_cluster.head import listens
from infl_cluster.pool import why_ended
from infl_cluster.status import StatusWriter
from infl_cluster.watch import watch
from influence_jobs.errors import RuntimeFault
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.store import layout
from influence_jobs.store import status as store_status
from influence_jobs.store.lease import Lease
from influence_jobs.store.process import hangs, oom_kills
from influence_jobs.store.run import Run
from influence_jobs.store.status import read_status


@contextmanager
def listening(*, answers: bool) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not answers:
                time.sleep(1)
            self.send_response(503)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_part_of_ray_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "LISTEN_DEADLINE_S", 0.2)
    with listening(answers=True) as address:
        assert listens(f"http://{address}")
    assert not listens(f"http://{address}")
    with listening(answers=False) as address, pytest.raises(RuntimeFault, match="cluster down"):
        listens(f"http://{address}")


def test_a_driver_is_stopped_only_while_ray_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(answers=True) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert why_ended() is None
    assert "has died" in str(why_ended())
    handler = signal.getsignal(signal.SIGTERM)
    try:
        stop_on_sigterm(why_ended)
        with pytest.raises(RuntimeFault, match="the Ray that computed it has died"):
            os.kill(os.getpid(), signal.SIGTERM)
        stop_on_sigterm(lambda: None)
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, handler)


def sleeper() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def wait_for_sleep(pid: int) -> None:
    """Wait until a sleeper has started, as it waits for the disk until then."""
    while psutil.Process(pid).status() != psutil.STATUS_SLEEPING:
        time.sleep(0.01)


def test_what_a_silent_process_waits_for() -> None:
    with sleeper() as process:
        wait_for_sleep(process.pid)
        assert "a long step, or it hangs" in hangs(process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        assert f"it is stopped: kill -CONT {process.pid}" in hangs(process.pid)
        process.kill()
    assert hangs(process.pid) == "it is gone"


def test_a_silent_shard_is_told_though_others_go_on(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(str(tmp_path), grad_norms_spec)
    with StatusWriter(run) as status, sleeper() as process:
        status._running = {"one", "two"}
        status.started("one", f"{socket.gethostname()}:{process.pid}")
        status.started("two", "elsewhere:7")
        monkeypatch.setattr(status_module, "QUIET_S", 0.3)
        time.sleep(0.4)
        run.write_json(f"{layout.PROGRESS}/two.json", {"units": 5})
        status._write()
        told = str(read_status(run)["message"])
        assert told.startswith("no progress in shard one for 0 s: process ")
        assert f"process {process.pid}, a long step, or it hangs" in told
        time.sleep(0.4)
        status._write()
        assert ", and in 1 more: process" in str(read_status(run)["message"])
        process.kill()


def test_a_damaged_progress_does_not_end_the_status(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that goes on looks like one that hangs."""
    monkeypatch.setattr(status_module, "BEAT_S", 0.02)
    run = Run.create(str(tmp_path), grad_norms_spec)
    with StatusWriter(run) as status:
        status._running = {"one"}
        run.files.write(f"{layout.PROGRESS}/one.json", b"[]")
        before = read_status(run)["updated_at"]
        time.sleep(0.2)
        assert read_status(run)["updated_at"] > before
        status.waits_for(None)
    assert read_status(run)["state"] == "done"


def test_a_job_whose_output_does_not_come_has_ended_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Client:
        def status(self, _job: str) -> str:
            return "FAILED"

        def logs(self, _job: str) -> str:
            raise RuntimeFault("no whole answer in 30 s")

    monkeypatch.setattr(ray_job, "client_of", lambda _job: Client())
    told = ray_job.job_watcher({"address": None, "submission_id": "job"})()
    assert told == "the Ray job failed: its output cannot be read: no whole answer in 30 s"


def job_that(status: str, output: str = "") -> Any:
    """Why the watcher of a job says that it has ended."""
    client: Any = SimpleNamespace(status=lambda _job: status, logs=lambda _job: output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_job, "client_of", lambda _job: client)
        return ray_job.job_watcher({"address": None, "submission_id": "job"})()


def test_the_end_of_a_job_is_not_told_in_rays_words() -> None:
    rays = "Running entrypoint for job run-1: python -m infl_cluster.driver_main runs run\n"
    assert job_that("RUNNING", rays) is None
    for status, told in {
        "SUCCEEDED": "its Ray job ended well, and some of its shards are not done: resume the run",
        "FAILED": "the Ray job failed: it has no output",
        "STOPPED": "the Ray job was stopped: it has no output",
    }.items():
        assert job_that(status, rays) == told
    assert job_that("FAILED", f"{rays}error: no room\n") == "the Ray job failed: no room"


def test_a_ray_that_is_silent_under_a_run_is_told(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the run's status said last, such as that a worker is gone, is of no use any more."""
    monkeypatch.setattr(ray_job, "SILENCE_S", -1.0)
    with listening(answers=True) as at:
        pass  # its port is closed now
    client = JobClient(f"http://{at}", None)
    monkeypatch.setattr(ray_job, "client_of", lambda _job: client)
    run = Run.create(str(tmp_path), grad_norms_spec)
    with StatusWriter(run) as status:
        status.says("no progress in shard one for 58 s: process 7, it is gone")
        status.waits_for(None)
        found = watch(
            run, ended=ray_job.job_watcher({"address": "x", "submission_id": "j"}), say=print
        )
    assert found["state"] == "interrupted"
    told = "Ray does not answer any more; resume the run once it is up again: no Ray answers at "
    assert found["message"] == f"{told}http://{at}: Connection refused"


def test_a_driver_looks_whether_ray_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = pool.RayBackend()
    monkeypatch.setattr(pool, "ASK_S", -1.0)
    with listening(answers=True) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert backend._ray_answers()
    assert not backend._ray_answers()
    monkeypatch.setattr(pool, "ASK_S", 60.0)
    monkeypatch.setattr(pool, "why_ended", lambda: pytest.fail("it was asked a moment ago"))
    assert not backend._ray_answers()


@pytest.mark.parametrize("killed", [True, False])
def test_a_driver_killed_for_memory_is_told(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    run = Run.create(str(tmp_path), grad_norms_spec)
    with Lease(run.files), StatusWriter(run):
        lease, status = run.files.read(layout.LEASE), run.files.read(layout.STATUS)
    run.files.write(layout.LEASE, lease)  # as a killed driver leaves it
    run.files.write(layout.STATUS, status)
    monkeypatch.setattr(store_status, "is_alive", lambda _holder: False)
    monkeypatch.setattr(store_status, "oom_kills", lambda: (oom_kills() or 0) + killed)
    found = read_status(run)
    assert found["state"] == "interrupted"
    assert ("lack of memory" in str(found["message"])) == killed


def test_a_watcher_outlasts_a_store_that_does_not_answer(
    tmp_path: Path, grad_norms_spec: GradNormsSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(str(tmp_path), grad_norms_spec)
    answers: Iterator[Any] = iter(
        [
            OSError("no answer"),
            {"state": "running", "message": "waits 5 s", "units_total": None, "units_done": 0},
            {"state": "running", "message": "waits 6 s", "units_total": None, "units_done": 0},
            {"state": "done", "units_total": None, "units_done": 0},
        ]
    )

    def read(_run: Run) -> dict[str, Any]:
        found: Any = next(answers)
        if isinstance(found, OSError):
            raise found
        return dict(found)

    said: list[str] = []
    monkeypatch.setattr(watch_module, "read_status", read)
    monkeypatch.setattr(watch_module, "POLL_S", 0.0)
    assert watch(run, ended=lambda: None, say=said.append)["state"] == "done"
    assert said == [f"{run.id}: no status: no answer", f"{run.id}: waits 5 s"]
