"""The Slurm script, on a Slurm of two nodes that both are this machine."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from influence_jobs.store.find import find_run
from influence_jobs.store.status import is_done

SCRIPT = Path(__file__).parents[2] / "cluster" / "deploy" / "slurm" / "infl.sbatch"
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("one", "two")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPort={ports[0]}
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
TASK = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from slurm_helper import SAMPLES
from influence_jobs import Task


class Mine(Task):
    def model(self):
        return nn.Linear(3, 2)

    def train_data(self):
        torch.manual_seed(0)
        return TensorDataset(torch.randn(SAMPLES, 3), torch.arange(SAMPLES) % 2)

    def losses(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    """The folder of a Slurm; SLURM_CONF leads commands to it."""
    daemons: list[subprocess.Popen[bytes]] = []
    # The path must be short: munge's socket lies in it, and so does Ray's token.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "key").write_bytes(secrets.token_bytes(128))
        (folder / "key").chmod(0o600)
        config = folder / "slurm.conf"
        host, user = socket.gethostname(), getpass.getuser()
        config.write_text(CONFIG.format(host=host, user=user, folder=folder, ports=free_ports(3)))
        patch.setenv("SLURM_CONF", str(config))
        munge = ["munged", "--foreground", f"--socket={folder}/munge.sock"]
        munge += [f"--{k}-file={folder}/{v}" for k, v in {
            "key": "key", "log": "munge.log", "pid": "munge.pid", "seed": "seed"
        }.items()]  # fmt: skip
        try:
            for command in (
                munge,
                ["slurmctld", "-D"],
                *(["slurmd", "-D", "-N", n] for n in NODES),
            ):
                with (folder / f"{command[0]}-{command[-1]}.out".replace("/", "_")).open(
                    "w"
                ) as out:
                    daemons.append(subprocess.Popen(command, stdout=out, stderr=out))
                time.sleep(1)
            deadline = time.monotonic() + 60
            while "idle" not in subprocess.run(
                ["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, check=False
            ).stdout:  # fmt: skip
                assert time.monotonic() < deadline
                time.sleep(0.5)
            yield folder
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(30)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(shutil.which, DAEMONS)),
    reason="needs Slurm: apt-get install slurmctld slurmd slurm-client munge",
)
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_run_in_an_allocation(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    (tmp_path / "slurm_task.py").write_text(TASK)
    (tmp_path / "slurm_helper.py").write_text("SAMPLES = 9000\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    code = "from infl_cli.entry import main; main()"
    (programs / "infl").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}' \"$@\"\n")
    (programs / "infl").chmod(0o755)
    path = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(path))
    monkeypatch.setenv("INFL_HOME", str(slurm / "home"))
    words = [
        "submit",
        "grad-norms",
        "--task",
        "slurm_task.py:Mine",
        "--layer",
        "all",
        "--epochs",
        "1",
    ]
    command = ["sbatch", "--wait", "--nodes", str(nodes), str(SCRIPT), *words]
    done = subprocess.run(
        [*command, "--runs", str(tmp_path / "runs")], cwd=tmp_path, timeout=550, check=False
    )
    (log,) = tmp_path.glob("infl-*.log")
    text = log.read_text()
    print(text)
    assert done.returncode == 0, text
    assert f"{nodes} of {nodes} nodes of http://127.0.0.1:" in text
    assert "slurm_helper.py, slurm_task.py (" in text
    run = find_run(str(tmp_path / "runs"), "grad-norms")
    assert is_done(run)
    logs = "".join(p.read_text() for p in sorted(Path(run.root, run.id, "logs").iterdir()))
    assert logs.count("computes on cpu") >= 2  # of the training, and of the norms
    assert not [*(slurm / "home").glob("slurm-*")]  # the token is gone
    until = time.monotonic() + 60  # Slurm takes some seconds to complete a job
    while queue := subprocess.run(["squeue", "--noheader"], capture_output=True, check=True).stdout:
        assert time.monotonic() < until, queue
        time.sleep(0.5)
