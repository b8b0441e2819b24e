import contextlib
import json
import socket
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from infl_cluster import client as client_module
from infl_cluster.client import FINAL_STATUSES, JobClient, NoAnswer, UnknownJob, remote_client
from influence_jobs.errors import RuntimeFault


@contextmanager
def http_server(status=200, body="{}", headers=()):
    """A server that gives one answer; yields its address and the requests that it gets."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def no_tokens(monkeypatch, tmp_path):
    """An environment without any token."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_nothing_listening_is_said_at_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(RuntimeFault, match=f"no Ray answers at http://127.0.0.1:{port}: .*refused"):
        JobClient(f"http://127.0.0.1:{port}", None).version()


def test_a_closed_port_of_a_cluster_has_its_cure(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(NoAnswer) as fault:
        remote_client(f"http://127.0.0.1:{port}").version()
    assert str(fault.value).endswith(
        "Connection refused; is the head up, the tunnel to it open, and this its dashboard's port "
        "(8265 by default)?"
    )


# What Ray's own port begins with: a frame of HTTP/2, and a token that it was not asked for.
GRPC = b"\x00\x00\x18\x04\x00\x00\x00\x00\x00\x00\x04\x00@\x00\x00\r\nsecret\r\n"


def test_a_port_that_speaks_no_http_is_told_in_words():
    def answer(server):
        connection, _ = server.accept()
        connection.recv(100)
        connection.sendall(GRPC)
        connection.close()

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        Thread(target=answer, args=(server,), daemon=True).start()
        with pytest.raises(NoAnswer) as fault:
            JobClient(f"http://127.0.0.1:{server.getsockname()[1]}", None).version()
    said = str(fault.value)
    assert said.isprintable()
    assert (
        "does not speak HTTP. It may be Ray's own port (6379 by default): give the one of" in said
    )
    assert "dashboard (8265 by default)" in said


def test_an_open_cluster_is_told_from_one_that_asks_for_the_token():
    body = json.dumps({"ray_version": "1", "session_name": "s"})
    with http_server(body=body) as (address, seen):
        assert JobClient(address, "secret").is_open()
    assert seen == [("/api/version", None)]
    for status in (401, 403, 302, 500):
        with http_server(status, body=body) as (address, _):
            assert not JobClient(address, "secret").is_open()


def test_a_head_without_an_agent_has_its_cure():
    with (
        http_server(500, body="No available agent to submit job, please try again later.") as at,
        pytest.raises(
            RuntimeFault, match=r"answered 500 .*port 52365: .*dashboard-agent-listen-po"
        ),
    ):
        JobClient(at[0], None).unfinished()


def test_a_silent_server_meets_the_deadline():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client = JobClient(f"http://127.0.0.1:{server.getsockname()[1]}", None, timeout_s=0.3)
        with pytest.raises(RuntimeFault, match=r"no whole answer in 0\.3 s"):
            client.status("x")


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"])
def test_a_server_that_answers_a_byte_at_a_time_meets_the_deadline_too(head):
    def drip(server):
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            connection.sendall(head)
            while True:
                connection.sendall(b"H")
                time.sleep(0.05)

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        Thread(target=drip, args=(server,), daemon=True).start()
        client = JobClient(f"http://127.0.0.1:{server.getsockname()[1]}", None, timeout_s=0.5)
        with pytest.raises(RuntimeFault, match=r"no whole answer in 0\.5 s"):
            client.logs("x")


def test_an_answer_without_an_end_is_not_kept(monkeypatch):
    monkeypatch.setattr(client_module, "MOST_BYTES", 1000)
    with (
        http_server(body="x" * 1001) as (address, _),
        pytest.raises(RuntimeFault, match="an answer without an end"),
    ):
        JobClient(address, None).version()


@pytest.mark.parametrize("body", ["<html>hello", "{}", "[]"])
def test_another_server_is_not_taken_for_ray(body):
    with (
        http_server(body=body) as (address, _),
        pytest.raises(RuntimeFault, match="something else"),
    ):
        JobClient(address, None).version()


def test_a_redirect_does_not_carry_the_token_away():
    with (
        http_server() as (elsewhere, stolen),
        http_server(302, headers=[("Location", elsewhere)]) as (address, seen),
        pytest.raises(RuntimeFault, match="answered 302"),
    ):
        JobClient(address, "secret").version()
    assert seen == [("/api/version", "Bearer secret")]
    assert stolen == []


def test_a_proxy_and_ray_address_are_not_obeyed(monkeypatch):
    body = json.dumps({"ray_version": "1", "session_name": "s"})
    with http_server(body=body) as (address, seen), http_server() as (elsewhere, stolen):
        monkeypatch.setenv("http_proxy", elsewhere)
        monkeypatch.setenv("RAY_ADDRESS", elsewhere)
        assert JobClient(address, "secret").version()["session_name"] == "s"
    assert len(seen) == 1
    assert stolen == []


def test_a_missing_token_is_asked_for():
    with (
        http_server(401) as (address, _),
        pytest.raises(RuntimeFault, match="wants a token: set RAY_AUTH_TOKEN_PATH"),
    ):
        JobClient(address, None).version()


def test_token_sources_in_order(no_tokens, monkeypatch):
    body = json.dumps({"ray_version": "1", "session_name": "s"})
    default, named = no_tokens / ".ray" / "auth_token", no_tokens / "named"
    default.parent.mkdir()
    default.write_text("from-home\n")
    named.write_text("from-path\n")
    with http_server(body=body) as (address, seen):
        remote_client(address).version()
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
        remote_client(address).version()
        monkeypatch.setenv("RAY_AUTH_TOKEN", "from-env")
        remote_client(address).version()
    assert [token for _, token in seen] == [
        "Bearer from-home",
        "Bearer from-path",
        "Bearer from-env",
    ]


def test_a_remote_cluster_without_a_token_is_refused(no_tokens):
    with pytest.raises(
        RuntimeFault, match=r"no Ray token in .*auth_token: set RAY_AUTH_TOKEN_PATH"
    ):
        remote_client("https://ray.example.org")


@pytest.mark.parametrize("token", ["", "  \n", "two\nlines", "ünicode"])
def test_an_unusable_token_is_refused(no_tokens, monkeypatch, token):
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(RuntimeFault, match="RAY_AUTH_TOKEN holds no Ray token"):
        remote_client("https://ray.example.org")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "give the dashboard's, http://head:8265"),
        ("http://ray.example.org:8265", "clear text: use https, or an SSH tunnel"),
        (
            "http://10.0.0.7:28265",
            r"clear text: .*\(ssh -L 28265:localhost:28265 10\.0\.0\.7\) and http://localhost:28265$",
        ),
        ("http://head", r"\(ssh -L 8265:localhost:80 head\) and http://localhost:8265$"),
        ("head:8265", r"give http\(s\)://HOST:PORT"),
        ("http://", r"give http\(s\)://HOST:PORT"),
        ("http://head:port", r"give http\(s\)://HOST:PORT"),
    ],
)
def test_unusable_addresses_are_refused(monkeypatch, address, message):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    with pytest.raises(RuntimeFault, match=message):
        remote_client(address)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_plain_http_is_for_this_machine(monkeypatch, host):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    assert remote_client(f"http://{host}:8265/").address == f"http://{host}:8265"


def run_to_end(client, code, submission_id, **env):
    client.submit(
        [sys.executable, "-c", code], submission_id=submission_id, metadata={"kind": "t"}, env=env
    )
    return wait_for(client, submission_id, FINAL_STATUSES)


def wait_for(client, submission_id, statuses):
    deadline = time.monotonic() + 60
    while (status := client.status(submission_id)) not in statuses:
        assert time.monotonic() < deadline, status
        time.sleep(0.1)
    return status


@pytest.mark.ray
def test_a_job_runs_with_its_environment_and_is_quoted(ray_head):
    client = ray_head.client()
    code = "import os; print('said', os.environ['WORD'], \"$HOME; 'quoted'\")"
    assert run_to_end(client, code, "round-trip", WORD="hello") == "SUCCEEDED"
    assert "said hello $HOME; 'quoted'" in client.logs("round-trip")
    assert client.unfinished() == []


@pytest.mark.ray
def test_a_failing_job_has_failed(ray_head):
    assert run_to_end(ray_head.client(), "raise SystemExit(3)", "fails") == "FAILED"


@pytest.mark.ray
def test_a_running_job_is_listed_and_stops(ray_head):
    client = ray_head.client()
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    client.submit(sleep, submission_id="sleeps", metadata={}, env={})
    assert client.unfinished() == ["sleeps"]
    wait_for(client, "sleeps", {"RUNNING"})
    client.stop("sleeps")
    assert wait_for(client, "sleeps", FINAL_STATUSES) == "STOPPED"
    client.stop("sleeps")  # once more is no error


@pytest.mark.ray
def test_a_submission_id_is_taken_once(ray_head):
    client = ray_head.client()
    run_to_end(client, "", "twice")
    with pytest.raises(RuntimeFault, match=r"job twice was submitted to .* before"):
        run_to_end(client, "", "twice")


@pytest.mark.ray
@pytest.mark.parametrize("call", [JobClient.status, JobClient.stop, JobClient.logs])
def test_an_unknown_job_is_told_apart(ray_head, call):
    with pytest.raises(UnknownJob, match="has no job never"):
        call(ray_head.client(), "never")


@pytest.mark.ray
def test_ray_with_a_token_is_not_open(ray_head):
    assert not ray_head.client().is_open()


@pytest.mark.ray
def test_a_wrong_token_is_refused_and_its_source_named(ray_head, monkeypatch, tmp_path):
    (tmp_path / "token").write_text("f" * 64)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    client = remote_client(ray_head.dashboard_url)
    with pytest.raises(RuntimeFault, match=rf"refuses the token from .*{tmp_path}/token"):
        client.submit(["true"], submission_id="wrong", metadata={}, env={})


@pytest.mark.ray
@pytest.mark.parametrize(("token", "status"), [(None, 401), ("f" * 64, 403)])
def test_strangers_cannot_submit(ray_head, tmp_path, token, status):
    probe = tmp_path / "probe"
    body = json.dumps({"entrypoint": f"touch {probe}"}).encode()
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(f"{ray_head.dashboard_url}/api/jobs/", body, headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == status
    assert ray_head.client().unfinished() == []
    assert not probe.exists()
