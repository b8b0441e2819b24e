"""How a head ends; each test starts its own."""

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from infl_cluster.head import current_head, ensure_head, recorded_head, remains, stop_head

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def home(monkeypatch):
    """An INFL_HOME with a short path and no head; a head started in it ends with the test."""
    with tempfile.TemporaryDirectory(prefix="infl-") as folder:
        monkeypatch.setenv("INFL_HOME", folder)
        yield Path(folder)
        if head := recorded_head():
            stop_head(head)


def wait_until(holds, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def submit(head, code):
    client = head.client()
    client.submit([sys.executable, "-c", code], submission_id="job", metadata={}, env={})
    wait_until(lambda: client.status("job") == "RUNNING")
    return client


def test_an_idle_head_ends_but_not_under_a_job(home, processes_of, alive):
    head = ensure_head(idle_timeout_s=4, num_cpus=1)
    client = submit(head, "import time; time.sleep(15)")
    processes = processes_of(head)
    wait_until(lambda: client.status("job") == "SUCCEEDED")  # longer than the time limit
    wait_until(lambda: not alive(processes))
    assert current_head() is None
    assert recorded_head() is None
    assert processes_of(head) == []
    assert not head.token_path.exists()


def test_stopping_asks_jobs_to_end_and_leaves_nothing(home, processes_of, alive):
    head = ensure_head(idle_timeout_s=None, num_cpus=1)
    note = home / "note"
    code = (
        "import pathlib, signal, sys, time\n"
        "def leave(*_):\n"
        f"    pathlib.Path({str(note)!r}).write_text('ended well')\n"
        "    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    client = submit(head, code)
    wait_until(lambda: "ready" in client.logs("job"))
    processes = processes_of(head)
    stop_head(head)
    assert note.read_text() == "ended well"
    assert alive(processes) == []
    assert processes_of(head) == []


def test_ray_ends_with_a_killed_supervisor(home, processes_of, alive):
    old = ensure_head(idle_timeout_s=None, num_cpus=1)
    submit(old, "import time; time.sleep(600)")
    processes = processes_of(old)
    os.kill(old.pid, signal.SIGKILL)
    wait_until(lambda: current_head() is None)
    wait_until(lambda: not alive(processes))
    assert processes_of(old) == []
    assert remains() == []


def test_what_a_killed_supervisor_leaves_is_cleared_away(home, processes_of, alive):
    old = ensure_head(idle_timeout_s=None, num_cpus=1)
    processes = processes_of(old)
    for process in processes:  # they hang, and do not end with it
        process.suspend()
    os.kill(old.pid, signal.SIGKILL)
    wait_until(lambda: current_head() is None)
    assert len(alive(processes)) > 1
    assert len(remains()) > 1
    new = ensure_head(idle_timeout_s=None, num_cpus=1)
    assert new.session_name != old.session_name
    assert alive(processes) == []
    assert processes_of(old) == []
    assert not old.token_path.exists()


@pytest.mark.parametrize(
    "victim", ["gcs_server", "raylet", "scripts.scripts", "ray::DashboardAgent"]
)
def test_a_head_whose_ray_dies_takes_its_record_and_the_rest_away(
    home, processes_of, alive, victim
):
    head = ensure_head(idle_timeout_s=None, num_cpus=1)
    processes = processes_of(head)
    killed = [
        process
        for process in psutil.Process(head.pid).children(recursive=True)
        if any(word.endswith(victim) for word in process.cmdline()[:4])
    ]
    killed[0].kill()
    wait_until(lambda: not alive(processes))
    assert recorded_head() is None
    assert processes_of(head) == []


def test_a_home_with_a_long_path_works(home, processes_of, monkeypatch):
    deep = home / ("deep" * 20)
    monkeypatch.setenv("INFL_HOME", str(deep))
    head = ensure_head(idle_timeout_s=None, num_cpus=1)
    assert str(head.temp_dir).startswith(f"/tmp/infl-{os.getuid()}-")
    for folder in head.temp_dir.parents[:2]:
        assert folder.stat().st_mode & 0o777 == 0o700
    submit(head, "import time; time.sleep(600)")
    stop_head(head)
    shutil.rmtree(head.temp_dir.parents[1])
    assert processes_of(head) == []
