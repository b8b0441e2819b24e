"""`infl view`: it listens on this machine alone, until Ctrl-C."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil


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
    browser = tmp_path / "bin" / "xdg-open"
    browser.parent.mkdir()
    browser.write_text(
        f'#!/bin/sh\ncp -p "$1" {tmp_path}/opened.html\n'
        f'echo "$@" > {tmp_path}/aside\nmv {tmp_path}/aside {tmp_path}/words\n'
    )
    browser.chmod(0o755)
    viewer = started(runs, "--open", PATH=f"{browser.parent}:{os.environ['PATH']}")
    try:
        url = viewer.stdout.readline().strip()
        deadline = time.monotonic() + 20
        while not (tmp_path / "words").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        words = (tmp_path / "words").read_text()
        assert "token" not in words
        opened = tmp_path / "opened.html"
        assert f"url={url}" in opened.read_text()
        assert stat.S_IMODE(opened.stat().st_mode) == 0o600
        viewer.send_signal(signal.SIGINT)
        viewer.communicate(timeout=20)
        assert not Path(words.strip()).exists()
    finally:
        viewer.kill()


def test_a_port_in_use_is_refused(refused: Callable[..., str], runs: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = refused("view", "grad-norms", "--port", port)
    assert f"cannot listen on port {port} (Address already in use): choose another" in line
