"""The Ray dashboard: opened signed in, without a trace of the token; and the names of its jobs."""

import base64
import contextlib
import io
import json
import os
import stat
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread

import pytest

import influence_jobs
from infl_cluster.client import FINAL_STATUSES, JobClient
from infl_cluster.dashboard import can_sign_in, copy_token, open_signed_in
from infl_cluster.launch import LONGEST_NAME, job_name
from influence_jobs.errors import RuntimeFault
from influence_jobs.store.run import Run

TOKEN = "t0ken" * 8
COOKIE = f"cookie={TOKEN}; HttpOnly; Path=/"


@pytest.fixture(autouse=True)
def display(monkeypatch, tmp_path):
    """A display, without any program that copies to its clipboard; `tmp_path` has programs."""
    for name in ("WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DISPLAY", ":77")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def get(url, **headers):
    """The status and headers of an answer, redirects not followed."""
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=10) as answer:
            return answer.status, answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


@contextmanager
def fake_ray(cookie=COOKIE):
    """A dashboard that gives a cookie for the token; yields a client of it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = (self.path, self.headers["Authorization"])
            self.send_response(200 if asked == ("/api/authenticate", f"Bearer {TOKEN}") else 403)
            if cookie:
                self.send_header("Set-Cookie", cookie)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield JobClient(f"http://127.0.0.1:{server.server_port}", TOKEN)
    finally:
        server.shutdown()
        server.server_close()


def wait_until(holds):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def place_in(file_url):
    """Where the file that the browser gets leads to."""
    path = Path(file_url.removeprefix("file://"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    return path.read_text().partition("url=")[2].partition('"')[0]


def test_a_page_that_answers_once_hands_the_cookie_over():
    answers, seen = [], []

    def browse(file_url):
        url = place_in(file_url)
        seen.extend([file_url, url])
        answers.append(get(url[:-1] + ("a" if url[-1] != "a" else "b")))
        answers.append(get(url))
        return True

    with fake_ray() as client:
        assert open_signed_in(client, browse=browse)
        wait_until(lambda: len(answers) == 2)
        (wrong, headers), (right, good) = answers
        assert (wrong, headers["Set-Cookie"]) == (404, None)
        assert (right, good["Location"]) == (303, f"{client.address}/")
    assert good["Set-Cookie"] == COOKIE
    assert good["Cache-Control"] == "no-store"
    assert not any(TOKEN in place for place in (*seen, good["Location"]))
    assert not Path(seen[0].removeprefix("file://")).exists()
    with pytest.raises(urllib.error.URLError):  # nobody listens any more
        get(seen[1])


def test_a_second_visitor_gets_nothing():
    found = []

    def browse(file_url):
        url = place_in(file_url)
        visitors = [Thread(target=lambda: found.append(get_or_refused(url))) for _ in range(3)]
        for visitor in visitors:
            visitor.start()
        return True

    def get_or_refused(url):
        try:
            return get(url)[1]["Set-Cookie"]
        except (urllib.error.URLError, OSError):
            return None

    with fake_ray() as client:
        assert open_signed_in(client, browse=browse)
    wait_until(lambda: len(found) == 3)
    assert sorted(found, key=str) == [None, None, COOKIE]


@pytest.mark.parametrize("opened", [True, False])
def test_a_browser_that_does_not_come_is_not_waited_for_long(opened):
    with fake_ray() as client:
        assert not open_signed_in(client, wait_s=0.3, browse=lambda _: opened)


def test_only_a_dashboard_of_this_machine_is_signed_in_to(monkeypatch):
    assert can_sign_in(CLIENT)
    assert can_sign_in(JobClient("http://[::1]:8265", TOKEN))
    assert not can_sign_in(JobClient("https://ray.example.com", TOKEN))
    monkeypatch.delenv("DISPLAY")
    monkeypatch.setattr("sys.platform", "linux")
    assert not can_sign_in(CLIENT)


def test_a_dashboard_that_refuses_or_gives_no_cookie_is_told():
    with fake_ray() as client:
        wrong = JobClient(client.address, "another", token_source="FILE")
        with pytest.raises(RuntimeFault, match="refuses the token from FILE"):
            open_signed_in(wrong, browse=lambda _: True)
    with fake_ray(cookie=None) as client, pytest.raises(RuntimeFault, match="no cookie"):
        open_signed_in(client, browse=lambda _: True)


def a_program(folder, name, *, works=True):
    path = folder / name
    python = f"import sys; open({str(folder / name)!r} + '.got', 'w').write(repr(sys.argv[1:]) + "
    code = f"{python} sys.stdin.read()); raise SystemExit({int(not works)})"
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)


CLIENT = JobClient("http://127.0.0.1:1", TOKEN, token_source="FILE")


def test_the_token_is_copied_by_the_first_program_that_works(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    a_program(tmp_path, "wl-copy")  # there is no Wayland
    a_program(tmp_path, "xclip", works=False)
    a_program(tmp_path, "xsel")
    assert "in the clipboard (by xsel)" in copy_token(CLIENT, io.StringIO())
    assert (tmp_path / "xsel.got").read_text() == f"['--clipboard', '--input']{TOKEN}"
    assert not (tmp_path / "wl-copy.got").exists()


def test_without_a_clipboard_the_terminal_gets_it_or_its_place_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    terminal = io.StringIO()
    assert copy_token(CLIENT, terminal) == "it asks for the token, which is in FILE"
    assert terminal.getvalue() == ""
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    said = copy_token(CLIENT, terminal)
    assert "sent to the terminal's clipboard" in said
    assert "FILE" in said
    assert TOKEN not in said
    start, text, end = terminal.getvalue().partition(base64.b64encode(TOKEN.encode()).decode())
    assert (start, bool(text), end) == ("\033]52;c;", True, "\a")


@pytest.mark.ray
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_browser_is_signed_in_to_the_real_dashboard(ray_head, browser, host):
    token = ray_head.token_path.read_text()
    client = JobClient(ray_head.dashboard_url.replace("127.0.0.1", host), token)
    files: Queue[str] = Queue()
    signed: list[bool] = []
    opening = Thread(
        target=lambda: signed.append(open_signed_in(client, browse=lambda u: not files.put(u)))
    )
    opening.start()
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(files.get(timeout=20))
        page.get_by_text("Recent jobs").wait_for()
        page.wait_for_load_state("networkidle")
        assert page.url.startswith(f"{client.address}/#/")
        assert page.locator("input[type=password]").count() == 0
        assert page.evaluate("fetch('/api/jobs/').then(answer => answer.status)") == 200
    opening.join(20)
    assert signed == [True]
    assert not any(token in url for url in asked)


def jobs_of(head):
    request = urllib.request.Request(
        f"{head.dashboard_url}/api/jobs/",
        headers={"Authorization": f"Bearer {head.token_path.read_text()}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return {job["submission_id"]: job for job in json.load(answer)}


@pytest.mark.slow
@pytest.mark.ray
def test_jobs_have_names_and_two_of_one_name_do_not_collide(ray_head, tmp_path, monkeypatch):
    examples = str(Path(__file__).parents[2] / "examples")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([examples, os.environ.get("PYTHONPATH", "")]))
    before = set(jobs_of(ray_head))
    runs = [
        influence_jobs.submit(
            "train",
            task="digits:DigitsTask",
            epochs=epochs,
            runs=tmp_path,
            ray=True,
            detach=True,
            quiet=True,
            device="cpu",
        )
        for epochs in (1, 2)
    ]
    deadline = time.monotonic() + 120
    while True:
        jobs = {name: job for name, job in jobs_of(ray_head).items() if name not in before}
        if all(job["status"] in FINAL_STATUSES for job in jobs.values()):
            break
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert [job["metadata"]["job_name"] for job in jobs.values()] == ["train digitstask seed 0"] * 2
    assert {job["metadata"]["run"] for job in jobs.values()} == {found.run.id for found in runs}
    assert [found.state for found in runs] == ["done", "done"]


def test_a_name_is_that_of_the_work_and_fits_a_column(tmp_path, finished_run, monkeypatch):
    assert job_name(finished_run) == "grad-norms digitstask conv1,conv2,head"
    many = finished_run.spec.model_copy(update={"layers": tuple(f"block.{i}" for i in range(40))})
    name = job_name(Run(str(tmp_path), many))
    assert len(name) == LONGEST_NAME
    assert name.startswith("grad-norms digitstask block.0,block.1")
    assert name.endswith("...")
