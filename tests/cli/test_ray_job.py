"""Runs whose driver is a Ray job, on a fake cluster."""

import errno
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from infl_cli import cluster
from infl_cli import runs as runs_commands
from infl_cluster import client, ray_job, versions
from infl_cluster import head as head_module
from infl_cluster.client import UnknownJob
from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from infl_cluster.watch import watch
from influence_jobs.errors import RuntimeFault
from influence_jobs.home import make_known
from influence_jobs.store import find
from influence_jobs.store.documents import Status
from influence_jobs.store.lease import holder_of
from influence_jobs.store.run import Run, now
from influence_jobs.store.status import read_status, under_way

Infl = Callable[..., Any]

TRAIN = ("submit", "train", "--task", "digits:DigitsTask", "--epochs", "1")


class FakeCluster:
    """Accepts jobs and never starts them."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.env: Mapping[str, str] = {}
        self.full = self.open = False

    def version(self) -> dict[str, str]:
        return {}

    def is_open(self) -> bool:
        return self.open

    def upload(self, name: str, data: bytes) -> None:
        pass

    def submit(
        self, _argv: object, *, submission_id: str, env: Mapping[str, str], **_others: object
    ) -> str:
        self.env = env
        if self.full:
            raise RuntimeFault("no room")
        self.jobs[submission_id] = "PENDING"
        return submission_id

    def status(self, submission_id: str) -> str:
        try:
            return self.jobs[submission_id]
        except KeyError:
            raise UnknownJob("no such job") from None

    def stop(self, submission_id: str) -> None:
        self.jobs[submission_id] = "STOPPED"

    def logs(self, _submission_id: str) -> str:
        return ""


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    """A fake cluster in place of the local Ray and of all others."""
    fake = FakeCluster()
    head = SimpleNamespace(
        client=lambda: fake, dashboard_url="http://here", token_path=Path("token")
    )
    monkeypatch.setattr(head_module, "ensure_head", lambda **_: head)
    monkeypatch.setattr(ray_job, "current_head", lambda: head)
    for module in (client, ray_job):
        monkeypatch.setattr(module, "remote_client", lambda _address: fake)
    return fake


def a_status(**fields: Any) -> dict[str, Any]:
    counts = dict.fromkeys(("shards_done", "units_before", "units_done", "retries"), 0)
    unknown = dict.fromkeys(("phase", "message", "shards_total", "units_total"))
    return {"state": "running", "started_at": 0, "failures": {}, **counts, **unknown, **fields}


def test_runs_that_wait_for_each_other_do_not_hang(tmp_path: Path, finished_run: Run) -> None:
    run = Run.create(str(tmp_path), finished_run.spec)
    run.write_json("status.json", a_status(phase=run.id, updated_at=now()))
    assert under_way(run, read_status(run))[0].id == run.id


def held_by(run: Path, pid: int) -> None:
    """Write the lease of a driver."""
    holder = {
        "owner": f"process-{pid}",
        "host": socket.gethostname(),
        "pid": pid,
        "process_started": psutil.Process(pid).create_time(),
        "beat": time.time(),
    }
    (run / "lease.json").write_text(json.dumps(holder))


def test_a_job_is_stopped_before_it_drives(infl: Infl, ray: FakeCluster) -> None:
    run_id = infl(*TRAIN, "--detach", "--json").json["run"]
    status = infl("status", "train").out
    assert f"next    infl status {run_id} --follow\n" in status
    assert "resume" not in status
    assert infl("stop", "train").err == f"{run_id} is stopped; go on with: infl resume {run_id}\n"
    assert list(ray.jobs.values()) == ["STOPPED"]
    assert infl("stop", "train").err == f"{run_id} is not running\n"
    ray.jobs.clear()  # another head by now
    assert infl("stop", "train").err == f"{run_id} is not running\n"


def test_a_job_that_waits_for_another_driver_is_stopped_too(
    infl: Infl, ray: FakeCluster, tmp_path: Path
) -> None:
    run_id = infl(*TRAIN, "--detach", "--json").json["run"]
    with a_driver("input()", run_id) as driver:
        held_by(tmp_path / "runs" / run_id, driver.pid)
        assert f"{run_id} is stopped" in infl("stop", "train").err
        assert driver.wait(10) != 0
    assert list(ray.jobs.values()) == ["STOPPED"]


@contextmanager
def a_driver(code: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as driver:
        threading.Thread(target=driver.wait, daemon=True).start()  # no zombie
        yield driver
        driver.kill()


def test_a_driver_that_hangs_is_killed(
    infl: Infl, ray: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_commands, "STOP_GRACE_S", 0.5)
    run_id = infl(*TRAIN, "--detach", "--json").json["run"]
    with a_driver("input()", run_id) as driver:
        os.kill(driver.pid, signal.SIGSTOP)
        held_by(tmp_path / "runs" / run_id, driver.pid)
        assert f"{run_id} is stopped" in infl("stop", "train").err
        assert driver.wait(10) == -signal.SIGKILL


def test_a_process_that_is_no_driver_is_not_ended(
    infl: Infl, ray: FakeCluster, tmp_path: Path
) -> None:
    """A run folder may name any process of the user's."""
    run_id = infl(*TRAIN, "--detach", "--json").json["run"]
    with a_driver("input()") as victim:
        held_by(tmp_path / "runs" / run_id, victim.pid)
        found = infl("stop", "train")
        assert found.code == 2
        assert f"is process {victim.pid} (" in found.err
        assert "which infl has not started: end it yourself" in found.err
        assert victim.poll() is None


def test_the_driver_of_a_run_that_needs_this_one_is_ended(
    infl: Infl, ray: FakeCluster, tmp_path: Path
) -> None:
    """Its command line names the run that was asked for."""
    run_id = infl(*TRAIN, "--detach", "--json").json["run"]
    with a_driver("input()", "infl_cluster.driver_main", "runs", "another-run") as driver:
        held_by(tmp_path / "runs" / run_id, driver.pid)
        assert f"{run_id} is stopped" in infl("stop", "train").err
        assert driver.wait(10) != 0


def test_a_driver_of_another_user_is_told(
    infl: Infl, ray: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_pid: int, _signal: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    run_id = infl(*TRAIN, "--detach", "--json").json["run"]
    with a_driver("input()", run_id) as driver:
        held_by(tmp_path / "runs" / run_id, driver.pid)
        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", refuse)
            found = infl("stop", "train")
        assert found.code == 2
        assert f"is process {driver.pid}, which is another user's: let them stop it" in found.err


def test_a_driver_that_ends_meanwhile_is_stopped(
    infl: Infl, ray: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = infl(*TRAIN, "--detach", "--json").json["run"]
    lease = tmp_path / "runs" / run_id / "lease.json"

    class Gone:
        def __init__(self, pid: int) -> None:
            lease.unlink()
            raise psutil.NoSuchProcess(pid)

    with a_driver("input()", run_id) as driver:
        held_by(lease.parent, driver.pid)
        monkeypatch.setattr(psutil, "Process", Gone)
        monkeypatch.setattr(runs_commands, "live_holder", lambda files: holder_of(files))
        assert f"{run_id} is stopped" in infl("stop", "train").err


@pytest.mark.parametrize("words", [("stop",), ("status", "--follow")])
def test_the_token_goes_only_where_the_user_says(
    infl: Infl, ray: FakeCluster, tmp_path: Path, words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run folder may name any cluster."""
    monkeypatch.setenv("INFL_HOME", str(tmp_path / "home"))
    asked: list[str] = []
    monkeypatch.setattr(ray_job, "remote_client", lambda address: asked.append(address) or ray)
    monkeypatch.setattr(ray_job, "SILENCE_S", 0.0)
    run_id = infl(*TRAIN, "--detach", "--json").json["run"]
    theirs = "https://theirs.example:8265"
    job = {"address": theirs, "submission_id": next(iter(ray.jobs))}
    (tmp_path / "runs" / run_id / "job.json").write_text(json.dumps(job))
    ray.jobs[job["submission_id"]] = "FAILED"
    refused = infl(words[0], run_id, *words[1:])
    assert asked == []
    told = f"it runs on {theirs}, which you have not named on this machine"
    assert told in (refused.err + refused.out).replace("\n", " ")
    infl(words[0], run_id, *words[1:], "--address", theirs)
    assert set(asked) == {theirs}


def test_versions_are_compared_on_another_cluster_only(
    infl: Infl, ray: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the code is the same, and a commit during a run must not end its workers."""
    monkeypatch.setenv("INFL_HOME", str(tmp_path / "home"))
    assert infl(*TRAIN, "--detach").code == 0
    assert versions.VARIABLE not in ray.env
    for name, value in ray.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(versions, "software", lambda: {"revision": "of a commit since"})
    versions.require_same()
    monkeypatch.undo()


def test_a_job_is_written_down_before_it_is_submitted(
    infl: Infl, ray: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.full = True
    assert "no room" in infl(*TRAIN, "--detach").err
    (file,) = (tmp_path / "runs").glob("*/job.json")
    first = json.loads(file.read_text())
    assert first["submission_id"].startswith(file.parent.name)
    assert first["address"] is None
    ray.full = False
    assert infl("resume", "train", "--detach").code == 0
    assert list(ray.jobs) == [json.loads(file.read_text())["submission_id"]]


@pytest.mark.parametrize(
    "last",
    [
        "/usr/bin/python: (ModuleNotFoundError: No module named 'infl_cluster')",
        "/bin/sh: 1: python: not found",
    ],
)
def test_nodes_without_this_package_are_told(
    ray: FakeCluster, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    ray.jobs["job"] = "FAILED"
    monkeypatch.setattr(ray, "logs", lambda _id: f"first\n{last}\n")
    ended = ray_job.job_watcher({"address": None, "submission_id": "job"})
    said = ended()
    assert said.startswith(
        f"the Ray job failed: {last} (the `python` of the cluster's nodes has no"
    )
    assert "pip install 'influence-jobs[cli]==" in said


def test_an_earlier_job_says_nothing_of_a_driver_here(
    infl: Infl, runs: Path, finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs / finished_run.id
    (folder / "status.json").unlink()
    (folder / "job.json").write_text('{"address": null, "submission_id": "earlier"}')
    monkeypatch.setattr(ray_job, "current_head", lambda: None)
    monkeypatch.setattr(ray_job, "SILENCE_S", -1.0)
    held_by(folder, os.getpid())
    ended = ray_job.watcher(Run.open(str(runs), finished_run.id))
    answer = infl("resume", "grad", "--detach")
    assert answer.code == 0
    assert answer.err.startswith(f"{finished_run.id} is already running\n")
    assert ended() is None
    (folder / "lease.json").unlink()
    assert ended() == "the local Ray that ran it is gone"

    assert infl("resume", "grad", "--local").code == 0
    assert not (folder / "job.json").exists()


def test_runs_on_a_cluster_must_be_shared(infl: Infl, ray: FakeCluster, tmp_path: Path) -> None:
    said = infl(*TRAIN, "--detach", "--address", "http://localhost:1").err.splitlines()[0]
    assert said == (
        f"{tmp_path}/runs must be a folder that all nodes of http://localhost:1 share, at the same "
        "path; else choose one of s3:// or gs:// with --runs"
    )


def test_a_folder_that_was_seen_to_be_shared_is_not_told_again(
    infl: Infl, ray: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computes(argv: list[str], **_others: object) -> str:
        drive(argv[3], argv[4], InlineBackend())
        return "job"

    monkeypatch.setattr(ray, "submit", computes)
    for seed, (port, told) in enumerate(((2, True), (2, False), (3, True))):
        run = infl(*TRAIN, "--seed", seed, "--address", f"http://localhost:{port}")
        assert run.code == 0, run.err
        assert ("that all nodes of" in run.err) == told


def test_a_cluster_that_asks_for_no_token_is_told(infl: Infl, ray: FakeCluster) -> None:
    words = (*TRAIN, "--detach", "--address", "http://localhost:1")
    told = "http://localhost:1 asks for no token: whoever reaches it can run any code there"
    assert told not in infl(*words).err
    ray.open = True
    again = infl(*words, "--seed", "1")
    assert (again.code, told in again.err) == (0, True)
    assert "start Ray with RAY_AUTH_MODE=token" in again.err


def test_a_repaired_run_is_to_be_resumed(infl: Infl, runs: Path, finished_run: Run) -> None:
    folder = runs / finished_run.id
    (folder / "job.json").write_text('{"address": null, "submission_id": "done"}')
    chunk = next(path for path in (folder / "data.zarr").rglob("0") if path.is_file())
    chunk.write_bytes(b"damaged")
    assert infl("verify", "grad", "--repair").code == 0
    said = infl("status", "grad", "--follow").out
    assert re.search(rf"^next +infl resume {finished_run.id}$", said, re.MULTILINE)
    assert re.search(
        "^message +infl verify --repair has found shards that are to be", said, re.MULTILINE
    )


def test_a_ray_that_is_up_keeps_its_size(infl: Infl, monkeypatch: pytest.MonkeyPatch) -> None:
    head = SimpleNamespace(dashboard_url="http://here", token_path=Path("token"))
    monkeypatch.setattr(cluster, "ensure_head", lambda **_: head)
    for up in (None, head):
        monkeypatch.setattr(cluster, "current_head", lambda up=up: up)
        assert ("keeps its CPUs" in infl("cluster", "up", "--num-cpus", "3").err) == bool(up)
        assert "keeps its CPUs" not in infl("cluster", "up").err


def test_what_is_left_of_a_dead_ray_is_told(infl: Infl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "current_head", lambda: None)
    monkeypatch.setattr(cluster, "remains", lambda: [psutil.Process()])
    said = infl("cluster", "status").err
    assert f"Ray has died, and processes of it are left (1, such as {os.getpid()}): " in said
    assert "infl cluster down ends them" in said
    assert infl("cluster", "status", "--json").json == {"up": False, "left": [os.getpid()]}


def test_watching_does_not_list_all_runs(
    runs: Path, finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "run_ids", lambda _root: pytest.fail("runs are listed"))
    run = Run.open(str(runs), finished_run.id)
    status = run.read_json("status.json", Status)
    assert status is not None
    train = next(path.name for path in runs.iterdir() if path.name.startswith("train"))
    run.write_json("status.json", {**status, "phase": train})
    assert watch(run, ended=lambda: None, say=print)["phase"] == train


def test_the_progress_shown_is_of_the_run_that_is_worked_at(
    tmp_path: Path, finished_run: Run
) -> None:
    """A run may wait for a second one that waits for a third."""
    spec: Any = finished_run.spec
    train = spec.checkpoints[0].train
    specs = (spec, train.model_copy(update={"seed": 1}), train.model_copy(update={"seed": 2}))
    asked, needed, worked_at = (Run.create(str(tmp_path), spec) for spec in specs)
    states = ((asked, needed.id, None), (needed, worked_at.id, None), (worked_at, None, 9))
    for run, phase, total in states:
        run.write_json("status.json", a_status(phase=phase, units_total=total, updated_at=now()))
    found, status = under_way(asked, read_status(asked))
    assert found.id == worked_at.id
    assert status["units_total"] == 9


@pytest.fixture
def elsewhere(
    infl: Infl, ray: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    """A run whose job is on a cluster that the user named: its id, and the address."""
    monkeypatch.setenv("INFL_HOME", str(tmp_path / "home"))
    run_id = infl(*TRAIN, "--detach", "--json").json["run"]
    address = "http://localhost:8265"
    make_known("cluster", address)
    job = {"address": address, "submission_id": next(iter(ray.jobs))}
    (tmp_path / "runs" / run_id / "job.json").write_text(json.dumps(job))
    return run_id, address


def test_the_command_that_goes_on_names_the_cluster(
    infl: Infl, elsewhere: tuple[str, str], tmp_path: Path
) -> None:
    run_id, address = elsewhere
    again = f"infl resume {run_id} --address {address}"
    assert infl("stop", run_id).err == f"{run_id} is stopped; go on with: {again}\n"
    assert f"{run_id} is not done yet: {again}\n" in infl("top", run_id).err
    run = Run.open(str(tmp_path / "runs"), run_id)
    # A folder of a stranger may name any cluster: its address is not put into a command to copy.
    job = {"address": "http://theirs.example", "submission_id": "x"}
    run.write_json("job.json", job)
    assert run.resume_command.startswith(f"infl resume {run_id}")
    assert "theirs" not in run.resume_command
    (tmp_path / "runs" / run_id / "job.json").write_text("{")
    assert "--address" not in run.resume_command


def test_the_command_that_goes_on_asks_for_the_same_workers(
    infl: Infl, ray: FakeCluster, tmp_path: Path
) -> None:
    norms = ("submit", "grad-norms", *TRAIN[2:], "--layer", "all")
    asked = ["--workers", "2", "--num-gpus", "0.0", "--stalled-after", "60.0"]
    asked += ["--node-label", "a/b=c d", "--node-label", "e=f"]
    run_id = infl(*norms, *asked, "--detach", "--json").json["run"]
    run = Run.open(str(tmp_path / "runs"), run_id)
    words = shlex.split(run.resume_command)
    assert sorted(words[words.index(run_id) + 1 :]) == sorted(asked)
    infl("stop", run_id)
    found = infl(*words[1:], "--detach", "--json")
    assert (found.code, found.json["run"]) == (0, run_id)
    # A folder of a stranger may hold anything: only what was asked of workers becomes a command.
    job = {**json.loads(run.files.read("job.json")), "asked": {"trust": "", "workers": 3}}
    run.write_json("job.json", job)
    assert run.resume_command.endswith(" --workers 3")
    run.write_json("job.json", {**job, "asked": {"workers": "3; ls"}})
    assert "workers" not in run.resume_command


def test_nothing_is_stopped_without_a_token(
    infl: Infl, ray: FakeCluster, elsewhere: tuple[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def no_token(address: str) -> None:
        raise RuntimeFault(f"no Ray token for {address}")

    monkeypatch.setattr(ray_job, "remote_client", no_token)
    run_id, address = elsewhere
    with a_driver("input()", run_id) as driver:
        held_by(tmp_path / "runs" / run_id, driver.pid)
        assert infl("stop", run_id).err == f"error: no Ray token for {address}\n"
        time.sleep(0.5)
        assert driver.poll() is None
    assert list(ray.jobs.values()) == ["PENDING"]


def test_a_wrong_token_stops_nothing_and_a_cluster_that_is_gone_does_not_protect_a_driver(
    infl: Infl, ray: FakeCluster, elsewhere: tuple[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run_id, _ = elsewhere
    monkeypatch.setattr(ray, "status", lambda _: raises(RuntimeFault("it refuses the token")))
    with a_driver("input()", run_id) as driver:
        held_by(tmp_path / "runs" / run_id, driver.pid)
        assert infl("stop", run_id).err == "error: it refuses the token\n"
        time.sleep(0.5)
        assert driver.poll() is None
        monkeypatch.setattr(ray, "status", lambda _: raises(client.NoAnswer("gone")))
        assert infl("stop", run_id).err == "error: gone\n"  # whether its job is, nobody knows
        assert driver.wait(10) != 0


def test_a_run_that_has_ended_needs_no_cluster_to_be_stopped(
    infl: Infl, ray: FakeCluster, elsewhere: tuple[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run_id, _ = elsewhere
    monkeypatch.setattr(ray, "status", lambda _: raises(client.NoAnswer("gone")))
    assert infl("stop", run_id).err == "error: gone\n"  # it may wait there to begin
    infl("resume", run_id, "--local")
    answer = infl("stop", run_id)
    assert (answer.code, answer.err) == (0, f"{run_id} is not running\n")


def raises(error: BaseException) -> None:
    raise error


def test_a_job_that_died_before_its_run_began_is_told(infl: Infl, ray: FakeCluster) -> None:
    run_id = infl(*TRAIN, "--detach", "--json").json["run"]
    assert "status  new" in infl("status", run_id).out
    ray.jobs = dict.fromkeys(ray.jobs, "FAILED")
    ray.logs = lambda _: "one\nerror: no module x\n"  # type: ignore
    said = infl("status", run_id).out
    assert "status   interrupted\n" in said
    assert "message  the Ray job failed: no module x\n" in said
    assert f"next     infl resume {run_id}\n" in said


def test_a_resumed_run_does_not_forget_what_is_done(
    infl: Infl, ray: FakeCluster, runs: Path, finished_run: Run
) -> None:
    (runs / finished_run.id / "manifest" / "000000000-000000256.json").unlink()
    assert infl("verify", "grad", "--repair").code == 0
    told = {"shards_done": 5, "shards_total": 6, "units_done": 1250, "units_total": 1500}
    assert infl("resume", "grad", "--detach").code == 0
    found = infl("status", "grad", "--json").json["progress"]
    assert found["state"] == "new"
    assert {name: found[name] for name in told} == told
    said = infl("status", "grad").out
    assert re.search("status +new\n", said)
    assert re.search("samples +1,250 of 1,500\n", said)
    (row,) = (r for r in infl("runs", "--json").json["runs"] if r["run"] == finished_run.id)
    assert (row["status"], row["samples_done"]) == ("new", 1250)
    ray.jobs = dict.fromkeys(ray.jobs, "FAILED")
    said = infl("status", "grad").out
    assert re.search("status +interrupted\n", said)
    assert re.search("message +the Ray job failed: ", said)
    assert re.search("shards +5 of 6\n", said)
    assert infl("resume", "grad", "--local").code == 0
    assert infl("status", "grad", "--json").json["progress"]["state"] == "done"


def test_ctrl_c_while_a_run_is_submitted_says_that_it_may_have_begun(
    infl: Infl, ray: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "submit", lambda *_, **__: raises(KeyboardInterrupt()))
    answer = infl(*TRAIN)
    assert answer.code == 130
    assert "may have begun: infl status train-" in answer.err
