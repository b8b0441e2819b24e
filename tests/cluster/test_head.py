import contextlib
import dataclasses
import http.client
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from infl_cluster import head as heads
from infl_cluster import supervisor as supervisors
from infl_cluster.client import FINAL_STATUSES
from infl_cluster.head import Head, current_head, ensure_head, recorded_head, stop_head
from infl_cluster.supervisor import _free_ports
from influence_jobs.errors import RuntimeFault
from influence_jobs.home import infl_home


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An INFL_HOME without a head."""
    monkeypatch.setenv("INFL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def a_head(**fields):
    """A record that names this process."""
    values = {
        "pid": os.getpid(),
        "create_time": psutil.Process().create_time(),
        "gcs_address": "127.0.0.1:1",
        "dashboard_url": "http://127.0.0.1:1",
        "metrics_url": "http://127.0.0.1:1/metrics",
        "session_name": "session_x",
        "ray_version": "2",
        "token_path": Path("/nowhere/token"),
        "temp_dir": Path("/nowhere"),
        "idle_timeout_s": None,
    }
    return Head(**{**values, **fields})


def mode(path):
    return stat.S_IMODE(Path(path).stat().st_mode)


def test_without_a_record_there_is_no_head(home):
    assert recorded_head() is None
    assert current_head() is None
    assert mode(home) == 0o700


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"token_path": 1, "temp_dir": "x"}'])
def test_a_damaged_record_is_no_head(home, text):
    home.mkdir()
    (home / "head.json").write_text(text)
    assert recorded_head() is None


def test_a_record_comes_back_as_written(home):
    heads.write_record(a_head(idle_timeout_s=600.0))
    assert recorded_head() == a_head(idle_timeout_s=600.0)
    assert mode(home / "head.json") == 0o600
    assert [path.name for path in home.iterdir()] == ["head.json"]


def test_another_process_with_the_same_id_is_not_the_head_and_is_left_alone(home):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for stale in (a_head(create_time=1.0), a_head(pid=ended.pid)):
        heads.write_record(stale)
        assert current_head() is None
        stop_head(stale)  # would end this test run
        assert recorded_head() is None


@pytest.fixture
def silent(monkeypatch):
    """The address of a server that accepts and never answers."""
    monkeypatch.setattr(heads, "LISTEN_DEADLINE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_head_is_the_same_after_the_clock_was_set(home, silent):
    moved = psutil.Process().create_time() + 0.4
    heads.write_record(a_head(dashboard_url=silent, create_time=moved))
    with pytest.raises(RuntimeFault, match="does not answer"):  # the head counts as alive
        current_head()


def test_a_head_of_which_a_part_has_died_is_none(home):
    heads.write_record(a_head())  # nothing listens there
    assert current_head() is None


def test_processes_of_a_head_are_found_after_the_clock_was_set():
    # A session of its own: the leader of the test run's session may be outside this container.
    shell = ["sh", "-c", "sleep 30 & echo $!; wait"]
    with subprocess.Popen(shell, start_new_session=True, stdout=subprocess.PIPE) as leader:
        assert leader.stdout is not None
        child = int(leader.stdout.readline())
        started = psutil.Process(leader.pid).create_time()
        for moved in (0.4, -0.4):
            found = heads.head_processes(leader.pid, started + moved, Path("/nowhere"))
            assert {process.pid for process in found} == {leader.pid, child}
        os.killpg(leader.pid, signal.SIGKILL)


def test_the_supervisor_loads_no_heavy_library():
    code = (
        "import sys, infl_cluster.supervisor\n"
        "print([name for name in ('torch', 'zarr', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("record", ["gone", "another head's"])
def test_a_supervisor_without_its_record_ends_once_no_job_runs(home, tmp_path, monkeypatch, record):
    monkeypatch.setattr(supervisors, "UNKNOWN_TIMEOUT_S", 0.2)
    if record != "gone":
        heads.write_record(a_head(pid=1))
    jobs = [["job"], ["job"], []]

    class Client:
        address = "http://127.0.0.1:1"

        def unfinished(self):
            return jobs.pop(0) if len(jobs) > 1 else jobs[0]

    supervisor = supervisors.Supervisor(tmp_path, idle_timeout_s=None, num_cpus=None, num_gpus=None)
    # It ends after a while: a wrong supervisor would otherwise run for ever; this one returns 1.
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]) as ray:
        assert supervisor._watch(ray, Client()) == 0  # type: ignore[arg-type]
        assert jobs == [[]]
        ray.kill()


def test_a_head_that_does_not_answer_is_told(home, silent):
    heads.write_record(a_head(dashboard_url=silent))
    with pytest.raises(RuntimeFault, match=r"does not answer .*: end it with `infl cluster down`"):
        current_head()
    with pytest.raises(RuntimeFault, match="does not answer"):
        ensure_head(idle_timeout_s=None)


def test_our_folder_must_be_ours(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link", "file/below"):
        monkeypatch.setenv("INFL_HOME", str(tmp_path / name))
        with pytest.raises(RuntimeFault, match="set INFL_HOME"):
            infl_home()


@pytest.mark.ray
def test_secrets_are_the_owners_alone(ray_head):
    home = infl_home()
    folder = ray_head.token_path.parent
    assert ray_head.temp_dir.parent == folder
    assert [mode(path) for path in (home, home / "heads", folder)] == [0o700] * 3
    assert [mode(path) for path in (home / "head.json", ray_head.token_path)] == [0o600] * 2
    assert len(ray_head.token_path.read_text()) == 64


@pytest.mark.ray
def test_the_token_is_on_no_command_line(ray_head):
    token = ray_head.token_path.read_text()
    processes = heads.head_processes(ray_head.pid, ray_head.create_time, ray_head.temp_dir)
    words = [word for process in processes for word in process.cmdline()]
    assert words
    assert not any(token in word for word in words)


@pytest.mark.ray
def test_the_token_is_in_no_environment_no_log_and_no_job(ray_head):
    token = ray_head.token_path.read_text()
    client = ray_head.client()
    client.submit(["env"], submission_id="says-env", metadata={"a": "b"}, env={"C": "d"})
    while client.status("says-env") not in FINAL_STATUSES:
        time.sleep(0.2)
    assert "RAY_AUTH_TOKEN_PATH" in client.logs("says-env")
    assert token not in client.logs("says-env")
    request = urllib.request.Request(
        f"{ray_head.dashboard_url}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert token not in answer.read().decode()
    for process in heads.head_processes(ray_head.pid, ray_head.create_time, ray_head.temp_dir):
        with contextlib.suppress(psutil.Error):
            assert token not in "".join(process.environ().values())
    files = [path for path in ray_head.token_path.parent.rglob("*") if path.is_file()]
    assert len(files) > 10
    holding = [path for path in files if token.encode() in path.read_bytes()]
    assert holding == [ray_head.token_path]


def listening(head):
    """Addresses at which the processes of a head listen."""
    found = set()
    for process in heads.head_processes(head.pid, head.create_time, head.temp_dir):
        with contextlib.suppress(psutil.NoSuchProcess):  # idle workers come and go
            found |= {
                connection.laddr
                for connection in process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            }
    return found


@pytest.mark.ray
def test_every_port_is_of_this_machine_only(ray_head):
    found = listening(ray_head)
    assert len(found) > 5
    assert {address.ip for address in found} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@pytest.mark.ray
@pytest.mark.parametrize("headers", [{}, {"Authorization": f"Bearer {'f' * 64}"}])
def test_no_port_tells_of_jobs_or_takes_one_without_the_token(ray_head, tmp_path, headers):
    """Metrics are open, which SECURITY.md says; they are asked for elsewhere."""
    probe = tmp_path / "probe"
    body = json.dumps({"entrypoint": f"touch {probe}"}).encode()
    asked: list[tuple[str, str, bytes | None]]
    asked = [("GET", "/api/jobs/", None), ("GET", "/nodes?view=summary", None)]
    asked += [("GET", "/api/v0/actors", None), ("GET", "/api/version", None)]
    asked += [("POST", "/api/jobs/", body), ("POST", "/api/job_agent/jobs/", body)]
    refused = 0
    for address in listening(ray_head):
        for method, path, data in asked:
            connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=5)
            try:
                kind = {"Content-Type": "application/json"}
                connection.request(method, path, data, {**headers, **kind})
                answer = connection.getresponse()
                text = answer.read()
            except (OSError, http.client.HTTPException):  # gRPC
                continue
            finally:
                connection.close()
            is_metrics = answer.status == 200 and text.startswith(b"# HELP")
            assert is_metrics or answer.status >= 400, (address, method, path, text[:200])
            refused += answer.status in (401, 403)
    assert refused >= len(asked)
    assert ray_head.client().unfinished() == []
    assert not probe.exists()


@pytest.mark.ray
def test_a_live_head_is_used_again(ray_head):
    record = infl_home() / "head.json"
    os.utime(record, (0, 0))
    assert current_head() == ray_head
    assert record.stat().st_mtime == 0
    assert ensure_head(idle_timeout_s=600) == ray_head  # and stays without a time limit
    assert time.time() - record.stat().st_mtime < 60  # the idle clock starts again


@pytest.mark.ray
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("session_name", "session_other", "another Ray"), ("ray_version", None, "version .* has 0")],
)
def test_a_head_of_another_session_or_version_is_not_used(
    ray_head, home, monkeypatch, field, value, message
):
    if value is None:
        monkeypatch.setattr("importlib.metadata.version", lambda _: "0.1")
    else:
        ray_head = dataclasses.replace(ray_head, **{field: value})
    heads.write_record(ray_head)
    with pytest.raises(RuntimeFault, match=message):
        current_head()


def test_a_head_that_cannot_start_says_why_and_leaves_nothing(home, tmp_path, monkeypatch):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise ImportError('broken ray')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    with pytest.raises(RuntimeFault, match=r"did not start: ImportError: broken ray; see") as fault:
        ensure_head(idle_timeout_s=None)
    folder = Path(str(fault.value).rsplit("see ", 1)[1]).parent
    assert sorted(path.name for path in folder.iterdir()) == ["head.log"]
    assert recorded_head() is None
    words = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in words if any(str(folder) in word for word in line)]
    shutil.rmtree(folder.parent)  # in /tmp: the path of this test's home is too long


def test_ports_are_free_and_apart_from_those_of_workers():
    ports = _free_ports(7)
    assert len(set(ports)) == 7
    assert all(19999 < port < 32768 for port in ports)
    with socket.socket() as probe:
        probe.bind(("", ports[0]))
