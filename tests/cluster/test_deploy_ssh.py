"""The script for plain hosts, with two hosts that both are this machine."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "deploy" / "ssh" / "ray-over-ssh.sh"
# Every host has a home of its own; tunnels are not needed.
SSH = """#!/bin/sh
[ "$1" = -f ] && exit 0
host=${1#*@}
shift
mkdir -p "$HOSTS/$host"
HOME=$HOSTS/$host
cd "$HOME" && exec sh -c "$*"
"""


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.mark.slow
@pytest.mark.ray
def test_two_hosts_become_a_cluster_and_are_left_as_they_were(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ssh").write_text(SSH)
    (programs / "ssh").chmod(0o755)
    gcs, dashboard, client, *agents = free_ports(5)
    python = Path(sys.executable).parent
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="ssh-") as short:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
            "HOSTS": str(tmp_path / "hosts"),
            "INFL_HOME": str(tmp_path / "home"),
            "BIN": str(python),
            "PORT": str(gcs),
            "DASHBOARD": str(dashboard),
            "HEAD": "127.0.0.1",
            "HEAD_OPTIONS": f"--dashboard-agent-listen-port={agents[0]} --num-cpus=1 "
            f"--ray-client-server-port={client} --temp-dir={short}/ray",
            "NODE_OPTIONS": f"--dashboard-agent-listen-port={agents[1]} --num-cpus=1",
        }

        def script(verb: str) -> None:
            command = [str(SCRIPT), verb, "alice@one", "two"]
            subprocess.run(command, env=environment, check=True, timeout=60)

        script("up")
        token = tmp_path / "home" / "ssh" / "token"
        hosts = [tmp_path / "hosts" / name / ".infl" / "ssh" for name in ("one", "two")]
        try:
            for copy in (token, *(host / "token" for host in hosts)):
                assert copy.stat().st_mode & 0o777 == 0o600
            wait = [sys.executable, "-c", "from infl_cli.entry import main; main()", "cluster"]
            wait += ["wait", "--address", f"http://localhost:{dashboard}", "--nodes", "2"]
            done = subprocess.run(
                wait, env={**environment, "RAY_AUTH_TOKEN_PATH": str(token)}, check=False,
                capture_output=True, text=True,
            )  # fmt: skip
            logs = "".join((host / "ray.log").read_text() for host in hosts)
            assert done.stderr == f"2 of 2 nodes of http://localhost:{dashboard} are up\n", logs
        finally:
            pids = [int((host / "pid").read_text()) for host in hosts]
            script("down")
            deadline = time.monotonic() + 60
            while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
                time.sleep(0.2)
    assert not any(map(psutil.pid_exists, pids))
    assert not [path for host in hosts for path in host.iterdir() if path.name in ("token", "pid")]
    assert not token.exists()
