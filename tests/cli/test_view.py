"""`infl view`: it listens on this machine alone, until Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil


def test_a_viewer_runs_until_ctrl_c(runs: Path) -> None:
    code = "from infl_cli.main import main; main()"
    command = [sys.executable, "-c", code, "view", "grad-norms", "--runs", str(runs)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "examples")}
    viewer = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
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


def test_a_port_in_use_is_refused(refused: Callable[..., str], runs: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = refused("view", "grad-norms", "--port", port)
    assert f"cannot listen on port {port} (Address already in use): choose another" in line
