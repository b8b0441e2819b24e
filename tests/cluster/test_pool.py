import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from influence_jobs.jobs.base import Receipt

pytestmark = pytest.mark.ray


@dataclass
class Driver:
    """The process of `fake_driver.py`, and the folder that its workers write to."""

    process: subprocess.Popen
    root: Path
    begun: Sequence[tuple[str, str]] = ()
    rescues: Sequence[tuple[str, str]] = ()

    def start(
        self, ids, *, runner="FakeRunner", workers=2, idle_fault=None, quiet_s=0.0, **options
    ):
        request = {
            "root": str(self.root),
            "ids": ids,
            "runner": runner,
            "options": {"workers": workers, **options},
            "idle_fault": idle_fault,
            "quiet_s": quiet_s,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def result(self):
        """Receipts in order of arrival, each with whether it is tried again; and the fault."""
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                result = json.loads(line.removeprefix("RESULT "))
                self.begun, self.rescues = result["begun"], result["rescues"]
                return [(Receipt(*r[:-1]), r[-1]) for r in result["receipts"]], result["fault"]
        raise AssertionError(f"the driver ended with {self.process.wait()}")

    def run(self, ids, **options):
        self.start(ids, **options)
        return self.result()

    def starts(self):
        return Counter(path.stem for path in self.root.glob("*.[0-9]"))


@pytest.fixture(scope="module")
def driver_process(ray_head):
    """A driver as Ray starts it for a submitted job, with our fakes on its path."""
    environment = {
        **os.environ,
        "RAY_ADDRESS": ray_head.gcs_address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(ray_head.token_path),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as jobs have it from the Ray that runs them
    }
    argv = [sys.executable, str(Path(__file__).with_name("fake_driver.py"))]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        yield process
        process.kill()


@pytest.fixture
def driver(driver_process, tmp_path):
    return Driver(driver_process, tmp_path)


def live_actors(head):
    """The `repr` of the live actors."""
    url = f"{head.dashboard_url}/api/v0/actors?detail=1&limit=1000"
    headers = {"Authorization": f"Bearer {head.token_path.read_text()}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        actors = json.load(answer)["data"]["result"]["result"]
    return [actor["repr_name"] for actor in actors if actor["state"] == "ALIVE"]


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def outcome(receipts, shard):
    return [(r.status, r.kind, r.attempt, again) for r, again in receipts if r.shard == shard]


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def scrape(url):
    """Lines of a metrics endpoint; none while the node's agent is still starting."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read().decode().splitlines()
    except urllib.error.URLError:
        return []


def test_every_shard_is_done_once_with_more_workers_than_fit(driver):
    ids = [f"ok-{i}" for i in range(8)]
    receipts, fault = driver.run(ids, workers=5)
    assert fault is None
    assert sorted(r.shard for r, _ in receipts) == ids
    assert all((r.status, r.units, again) == ("done", 10, False) for r, again in receipts)
    assert driver.starts() == Counter(ids)
    environments = {path.read_text() for path in driver.root.glob("ok-*")}
    assert environments == {"1 0 10000"}


def test_a_lone_worker_computes_with_every_core(driver):
    receipts, fault = driver.run(["ok-0", "ok-1"], workers=1)
    assert (len(receipts), fault) == (2, None)
    assert (driver.root / "ok-1.1").read_text() == "2 0 10000"


def test_each_failure_is_handled_by_its_kind(driver):
    for attempt in (
        1,
        2,
        3,
    ):  # attempts of an earlier run, which must not use up this one's retries
        (driver.root / f"late.{attempt}").touch()
    receipts, fault = driver.run(["ok-0", "poison", "killed", "hiccup", "late", "killer", "ok-1"])
    assert fault is None
    assert outcome(receipts, "ok-0") == outcome(receipts, "ok-1") == [("done", None, 1, False)]
    assert outcome(receipts, "poison") == [("failed", "user", 1, False)]
    assert outcome(receipts, "killed") == [
        ("failed", "transient", 1, True),
        ("done", None, 2, False),
    ]
    assert outcome(receipts, "hiccup") == [
        ("failed", "transient", 1, True),
        ("failed", "transient", 2, True),
        ("done", None, 3, False),
    ]
    assert outcome(receipts, "late") == [
        ("failed", "transient", 4, True),
        ("done", None, 5, False),
    ]
    assert outcome(receipts, "killer") == [
        ("failed", "transient", 1, True),
        ("failed", "transient", 2, True),
        ("failed", "transient", 3, False),
    ]
    starts = {"ok-0": 1, "ok-1": 1, "poison": 1, "killed": 2, "hiccup": 3, "late": 5, "killer": 3}
    assert driver.starts() == starts
    message = next(r.error for r, _ in receipts if r.shard == "killer")
    process = next(worker for name, worker in driver.begun if name == "killer")
    assert message == f"worker process {process} is gone: it crashed or was killed"


def test_a_fatal_error_ends_the_run_and_its_workers(driver, ray_head):
    receipts, fault = driver.run(["full", *(f"ok-{i}" for i in range(50))], workers=1)
    assert fault == "the disk is full"
    assert outcome(receipts, "full") == [("failed", "fatal", 1, False)]
    assert driver.starts() == {"full": 1}
    wait_until(lambda: not live_actors(ray_head))


def stopped_process(driver):
    """The id of the process that stopped itself at its first attempt."""
    return next(
        int(worker.rpartition(":")[2]) for name, worker in driver.begun if name == "stopped"
    )


def test_the_shard_of_a_stopped_worker_is_taken_over_by_an_idle_one(driver):
    receipts, fault = driver.run(["stopped", *(f"ok-{i}" for i in range(4))])
    assert fault is None
    assert outcome(receipts, "stopped") == [("done", None, 2, False)]
    assert len(receipts) == 5
    assert driver.starts() == {"stopped": 2, **{f"ok-{i}": 1 for i in range(4)}}
    assert [rescue for rescue, _ in driver.rescues] == ["backup", "backup won"]
    stopped = stopped_process(driver)
    assert f"in process {socket.gethostname()}:{stopped}: process " in driver.rescues[0][1]
    wait_until(lambda: not is_running(stopped))


@pytest.mark.slow
def test_a_stopped_worker_is_ended_and_replaced(driver):
    receipts, fault = driver.run(["stopped"], workers=1, stalled_after_s=10.0, quiet_s=1e9)
    assert fault is None
    stopped = stopped_process(driver)
    ((rescue, line),) = driver.rescues
    process = f"{socket.gethostname()}:{stopped}"
    pattern = rf"no progress for 0:1\d in process {process}, which was ended"
    assert rescue == "stalled"
    assert re.fullmatch(f"shard stopped: {pattern}", line)
    assert outcome(receipts, "stopped") == [
        ("failed", "transient", 1, True),
        ("done", None, 2, False),
    ]
    assert re.fullmatch(pattern, receipts[0][0].error)
    wait_until(lambda: not is_running(stopped))


@pytest.mark.slow
def test_workers_that_hang_at_the_start_end_the_run(driver):
    _, fault = driver.run(["ok"], runner="Hanging", workers=1, stalled_after_s=3.0)
    assert fault == (
        "workers hang while they load the model and the data: none was ready after 0:03"
    )


def test_idle_may_end_the_run(driver):
    _, fault = driver.run(["held"], idle_fault="another driver took over")
    assert fault == "another driver took over"


def test_a_refused_run_is_told_in_its_own_words(driver):
    assert driver.run(["ok"], runner="Refusing") == ([], "the run folder is gone")


def test_workers_that_die_at_once_end_the_run(driver):
    _, fault = driver.run(["ok"], runner="Dying", workers=1)
    assert fault.startswith("workers die while starting: ")


def test_a_cluster_that_is_too_small_is_told(driver):
    _, fault = driver.run(["ok"], num_gpus=2, placement_timeout_s=1)
    assert fault == (
        "a worker takes CPU 2, GPU 2, and the nodes have CPU 2, GPU 0; lower --num-gpus, take "
        "--device cpu, or add such a node"
    )


def test_metrics_and_titles_are_shown(driver, ray_head):
    driver.start(["hiccup", "held"])
    title = f"ShardWorker(fake {driver.root.name} on cpu)"
    wait_until(lambda: title in live_actors(ray_head))
    names = ["shards_done_total", "samples_total", "samples_per_second", "gpu_memory_bytes"]
    names += ["run_retries", "run_samples_per_second", "run_eta_seconds"]
    labels = {'kind="fake-kind"', f'run="{driver.root.name}"', f'folder="{driver.root}"'}

    def exported():
        lines = [s for s in scrape(ray_head.metrics_url) if all(label in s for label in labels)]
        return [name for name in names if any(s.startswith(f"ray_infl_{name}{{") for s in lines)]

    wait_until(lambda: exported() == names)
    (driver.root / "release").touch()
    assert driver.result()[1] is None
