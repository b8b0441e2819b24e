"""`infl view` listens on this machine only, until Ctrl-C."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import httpx
import psutil
import pytest


def started(runs: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    code = "from infl_cli.main import main; main()"
    command = [sys.executable, "-c", code, "view", "grad-norms", "--runs", str(runs), *words]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "examples"), **env}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def test_a_viewer_runs_until_ctrl_c(runs: Path) -> None:
    viewer = started(runs)
    try:
        url = viewer.stdout.readline().strip()
        with httpx.Client(follow_redirects=True, timeout=30) as client:
            page = client.get(url)
            assert page.status_code == 200
            assert next(runs.glob("grad-norms-*")).name in page.text
            assert client.get(url + "x").status_code == 401
        listening = [
            one.laddr.ip
            for one in psutil.Process(viewer.pid).net_connections()
            if one.status == psutil.CONN_LISTEN
        ]
        assert listening == ["127.0.0.1"]
        viewer.send_signal(signal.SIGINT)
        _, said = viewer.communicate(timeout=20)
        assert viewer.returncode == 130
        assert said == "Ctrl-C ends it\n"
    finally:
        viewer.kill()


def test_a_browser_is_told_the_token_by_a_private_file(runs: Path, tmp_path: Path) -> None:
    browser, home = tmp_path / "bin" / "browser", tmp_path / "home"
    browser.parent.mkdir()
    home.mkdir()
    # A browser that returns only when it is closed.
    browser.write_text(
        f'#!/bin/sh\ncp -p "${{1#file://}}" {tmp_path}/opened.html\n'
        f'echo "$@" > {tmp_path}/aside\nmv {tmp_path}/aside {tmp_path}/words\nexec sleep 60\n'
    )
    browser.chmod(0o755)
    viewer = started(runs, "--open", BROWSER=str(browser), HOME=str(home))
    opened_browser: list[psutil.Process] = []
    try:
        url = viewer.stdout.readline().strip()
        assert httpx.get(url, timeout=30).status_code == 303
        deadline = time.monotonic() + 20
        while not (tmp_path / "words").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        opened_browser = psutil.Process(viewer.pid).children()
        words = (tmp_path / "words").read_text().strip()
        assert "token" not in words
        page = Path(words.removeprefix("file://"))
        # A browser in a sandbox sees neither /tmp nor hidden files of the home folder.
        assert page.is_relative_to(home)
        assert not any(part.startswith(".") for part in page.relative_to(home).parts)
        assert stat.S_IMODE(page.parent.stat().st_mode) == 0o700
        opened = tmp_path / "opened.html"
        assert f"url={url}" in opened.read_text()
        assert stat.S_IMODE(opened.stat().st_mode) == 0o600
        viewer.send_signal(signal.SIGINT)
        viewer.wait(timeout=20)
        assert not page.parent.exists()
    finally:
        viewer.kill()
        for process in opened_browser:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("home", "why"), [("home", ""), ("file", " ([Errno 20] Not a directory: ")]
)
def test_where_no_browser_opens_it_says_so(runs: Path, tmp_path: Path, home: str, why: str) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "file").touch()
    # The variables by which Python finds browsers.
    nowhere = dict.fromkeys(("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"), "")
    nowhere |= {"PATH": str(tmp_path / "home"), "HOME": str(tmp_path / home)}
    viewer = started(runs, "--open", **nowhere, MPLCONFIGDIR=str(tmp_path))
    too_long = Timer(30, viewer.kill)
    too_long.start()
    try:
        url = viewer.stdout.readline().strip()
        said = {viewer.stderr.readline().strip() for _ in range(2)}
        assert httpx.get(url, timeout=30).status_code == 303
        said.remove("Ctrl-C ends it")
        by_hand = "no browser could be opened: open the address above by hand"
        assert said.pop().startswith(by_hand + why)
        viewer.send_signal(signal.SIGINT)
        viewer.communicate(timeout=20)
        assert viewer.returncode == 130
    finally:
        too_long.cancel()
        viewer.kill()


def test_a_port_in_use_is_refused(refused: Callable[..., str], runs: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = refused("view", "grad-norms", "--port", port)
    assert f"cannot listen on port {port} (Address already in use): choose another" in line
