"""The process that owns the embedded head: `python -m infl_cluster.supervisor FOLDER`.

It runs `ray start --head --block` as its child, and records the head once it answers. After an idle
time, or on SIGTERM or SIGINT, it stops the child and all processes that came from it.
"""

import argparse
import contextlib
import ctypes
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import filelock
import psutil

from infl_cluster import head as heads
from infl_cluster import store_access
from infl_cluster.client import JobClient
from influence_jobs.errors import RuntimeFault
from influence_jobs.home import infl_home

OBJECT_STORE_BYTES = 300_000_000  # small: our tasks exchange ids and receipts, never arrays
JOB_STOP_DEADLINE_S = 6.0  # Ray itself gives a job 3 s between SIGTERM and SIGKILL
RAY_STOP_DEADLINE_S = 10.0
LONGEST_POLL_S = 10.0
UNKNOWN_TIMEOUT_S = 30.0  # a head without a record ends after so long without a job
# Above Ray's worker ports (10002-19999) and below the ephemeral ports of Linux (from 32768).
PORTS = range(20000, 32768)
# Variables of the caller that name another cluster, or would override the token file.
FOREIGN_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Supervisor:
    """Starts, watches and stops one head.

    Args:
        folder: The head's own folder, for the token and Ray's temporary files.
        idle_timeout_s: End after this long without a job; None: never.
        num_cpus: CPUs to offer; None: all.
        num_gpus: GPUs to offer; None: all.
    """

    def __init__(
        self,
        folder: Path,
        *,
        idle_timeout_s: float | None,
        num_cpus: int | None,
        num_gpus: int | None,
    ) -> None:
        self._idle_timeout_s = idle_timeout_s
        self._num_cpus, self._num_gpus = num_cpus, num_gpus
        self._folder = folder
        self._token_path = folder / heads.TOKEN
        # Ray makes its folder readable to all users; only the owner can enter the one around it.
        self._temp_dir = folder / "ray"
        self._create_time = psutil.Process().create_time()
        names = (
            "gcs",
            "dashboard",
            "agent",
            "client",
            "metrics",
            "autoscaler",
            "dashboard-metrics",
        )
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))
        self._argv = self._ray_start(num_cpus, num_gpus)
        self._stopping = False

    def run(self) -> int:
        """Run the head until it is stopped, idle or dead; return the exit code."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        token = secrets.token_hex(32)
        descriptor = os.open(self._token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(token)
        client = JobClient(f"http://127.0.0.1:{self._ports['dashboard']}", token, timeout_s=5.0)
        ray = subprocess.Popen(
            self._argv,
            stdin=subprocess.DEVNULL,
            env=self._environment(),
            preexec_fn=_end_with_parent() if sys.platform == "linux" else None,  # noqa: PLW1509  no threads here
        )
        try:
            head = self._wait_until_up(ray, client)
            if head is None:
                return 0 if self._stopping else 1
            heads.write_record(head)
            return self._watch(ray, client)
        finally:
            heads.remove_record(os.getpid())
            self._stop(ray, client)
            heads.forget_secrets(self._folder)

    def _on_signal(self, _signum: int, _frame: FrameType | None) -> None:
        self._stopping = True

    def _ray_start(self, num_cpus: int | None, num_gpus: int | None) -> list[str]:
        options = {
            "--port": self._ports["gcs"],
            "--dashboard-host": "127.0.0.1",
            "--dashboard-port": self._ports["dashboard"],
            "--dashboard-agent-listen-port": self._ports["agent"],
            "--ray-client-server-port": self._ports["client"],
            "--metrics-export-port": self._ports["metrics"],
            "--temp-dir": self._temp_dir,
            "--object-store-memory": OBJECT_STORE_BYTES,
            "--log-color": "false",
            "--num-cpus": num_cpus,
            "--num-gpus": num_gpus,
        }
        argv = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        argv += ["--include-dashboard=true", "--disable-usage-stats"]
        return argv + [f"{name}={value}" for name, value in options.items() if value is not None]

    def _environment(self) -> Mapping[str, str]:
        """Return the environment of Ray; jobs inherit it."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in FOREIGN_VARIABLES and not name.startswith(store_access.STORE_PREFIXES)
        }
        return environment | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token_path),
            "RAY_TMPDIR": str(self._temp_dir),
            "RAY_USAGE_STATS_ENABLED": "0",
            # One machine is all there is: without clusters Ray listens on loopback addresses only.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # Otherwise Ray waits 30 s for work to end; the jobs have ended by then.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "AUTOSCALER_METRIC_PORT": str(self._ports["autoscaler"]),
            "DASHBOARD_METRIC_PORT": str(self._ports["dashboard-metrics"]),
        }

    def _wait_until_up(
        self, ray: "subprocess.Popen[bytes]", client: JobClient
    ) -> heads.Head | None:
        """Wait until head and node are up; None if Ray ended, hung or was told to stop."""
        deadline = time.monotonic() + heads.START_DEADLINE_S
        reason = "the node is missing"
        while ray.poll() is None and not self._stopping:
            try:
                version = client.version()
                reason = "its agent is missing"
                if client.num_nodes() and heads.listens(self._agent_url()):
                    return self._record(client.address, version)
            except RuntimeFault as fault:
                reason = str(fault)
            if time.monotonic() > deadline:
                print(f"not up after {heads.START_DEADLINE_S:g} s: {reason}", flush=True)
                return None
            time.sleep(0.1)
        return None

    def _record(self, dashboard_url: str, version: Mapping[str, str]) -> heads.Head:
        return heads.Head(
            pid=os.getpid(),
            create_time=self._create_time,
            gcs_address=f"127.0.0.1:{self._ports['gcs']}",
            dashboard_url=dashboard_url,
            metrics_url=f"http://127.0.0.1:{self._ports['metrics']}/metrics",
            session_name=version["session_name"],
            ray_version=version["ray_version"],
            token_path=self._token_path,
            temp_dir=self._temp_dir,
            idle_timeout_s=self._idle_timeout_s,
            agent_url=self._agent_url(),
            num_cpus=self._num_cpus,
            num_gpus=self._num_gpus,
        )

    def _agent_url(self) -> str:
        return f"http://127.0.0.1:{self._ports['agent']}"

    def _watch(self, ray: "subprocess.Popen[bytes]", client: JobClient) -> int:
        """Wait until Ray ends, a signal arrives, or the head was idle for long enough.

        A head without its record cannot be found any more, and ends after its jobs.

        Returns:
            The exit code: 1 if Ray ended by itself, else 0.
        """
        busy_at = known_at = time.time()
        polled_at = 0.0
        checked_at = time.monotonic()
        while not self._stopping:
            if ray.poll() is not None:
                return 1
            time.sleep(0.2)
            if time.monotonic() - checked_at > LONGEST_POLL_S:
                checked_at = time.monotonic()
                # Of those that end themselves in order, `ray start` takes no notice.
                for url in (client.address, self._agent_url()):
                    if _is_dead(url):
                        print(f"a part of Ray has died: nothing listens at {url}", flush=True)
                        return 1
                self._forget_access(client)
            head = heads.recorded_head()
            known = head is not None and head.pid == os.getpid()
            if known:
                known_at = time.time()
            timeout_s = head.idle_timeout_s if head is not None and known else UNKNOWN_TIMEOUT_S
            if timeout_s is None:
                continue
            if time.monotonic() - polled_at < min(LONGEST_POLL_S, timeout_s / 4):
                continue
            polled_at = time.monotonic()
            if _has_jobs(client):
                busy_at = time.time()
            elif not known:
                if time.time() - max(busy_at, known_at) >= timeout_s:
                    return 0
            elif self._retire(busy_at, timeout_s):
                return 0
        return 0

    def _forget_access(self, client: JobClient) -> None:
        folder = self._folder / heads.ACCESS
        if store_access.kept(folder):
            with contextlib.suppress(RuntimeFault):
                store_access.forget_ended(folder, client.unfinished())

    def _retire(self, busy_at: float, idle_timeout_s: float) -> bool:
        """Remove the record if the head was idle for long enough; return whether it was."""
        try:
            # A process that holds the lock may be about to use this head: try at the next poll.
            with heads.head_lock(timeout_s=0):
                used_at = max(busy_at, (infl_home() / "head.json").stat().st_mtime)
                if time.time() - used_at < idle_timeout_s:
                    return False
                heads.remove_record(os.getpid())
                return True
        except (filelock.Timeout, FileNotFoundError):
            return False

    def _stop(self, ray: "subprocess.Popen[bytes]", client: JobClient) -> None:
        """End the jobs, then Ray, then the processes that are left of either."""
        if ray.poll() is None:
            _stop_jobs(client)
            ray.terminate()
            try:
                ray.wait(RAY_STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                ray.kill()
                ray.wait()
        left = heads.head_processes(os.getpid(), self._create_time, self._temp_dir)
        heads.end_processes([process for process in left if process.pid != os.getpid()])


def _is_dead(url: str) -> bool:
    try:
        return not heads.listens(url)
    except RuntimeFault:
        return False  # it hangs, and may go on


def _end_with_parent() -> Callable[[], None]:
    """A function that asks Linux to end this process if its parent dies.

    A killed supervisor would leave a Ray that no one finds and that never ends.
    """
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


def _has_jobs(client: JobClient) -> bool:
    try:
        return bool(client.unfinished())
    except RuntimeFault:
        return True  # a head that is too busy to answer is not idle


def _stop_jobs(client: JobClient) -> None:
    """Ask every job to end, and wait for that if Ray still answers."""
    deadline = time.monotonic() + JOB_STOP_DEADLINE_S
    with contextlib.suppress(RuntimeFault):
        for submission_id in client.unfinished():
            client.stop(submission_id)
        while client.unfinished() and time.monotonic() < deadline:
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    free: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        free.append(port)
        if len(free) == count:
            return free
    raise RuntimeFault(f"fewer than {count} free ports between {PORTS[0]} and {PORTS[-1]}")


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--idle-timeout-s", type=float)
    parser.add_argument("--num-cpus", type=int)
    parser.add_argument("--num-gpus", type=int)
    options = parser.parse_args()
    return Supervisor(
        options.folder,
        idle_timeout_s=options.idle_timeout_s,
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
    ).run()


if __name__ == "__main__":
    sys.exit(main())
