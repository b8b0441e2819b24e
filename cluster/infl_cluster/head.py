"""The embedded head: one Ray on this machine, started on demand, reused, and stopped by pid.

A supervisor process (`infl_cluster.supervisor`) owns the head. It starts Ray, writes the record
`head.json` once Ray answers, and removes the record before it stops Ray. A reader of the record
compares the pid, the start time, and the session name that the head reports.
"""

import dataclasses
import hashlib
import http.client
import importlib.metadata
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import filelock
import psutil

from infl_cluster.client import JobClient
from influence_jobs.errors import RuntimeFault
from influence_jobs.home import infl_home, private_dir
from influence_jobs.store.process import CLOCK_STEP_S, is_running, is_same

START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 30.0
ANSWER_DEADLINE_S = 15.0
LISTEN_DEADLINE_S = 5.0
# A UNIX socket's path is limited to 107 bytes. Ray appends up to 64 to its temporary folder:
# /session_YYYY-MM-DD_hh-mm-ss_uuuuuu_PPPPPPP/sockets/plasma_store
MAX_TEMP_DIR_LENGTH = 107 - 64
KEPT_FOLDERS = 3
TOKEN, ACCESS = "token", "access"  # in the folder of a head


@dataclass(frozen=True)
class Head:
    """A running local head, as recorded in `head.json`."""

    pid: int
    """Process id of the supervisor, which is also its session id."""
    create_time: float
    gcs_address: str
    dashboard_url: str
    metrics_url: str
    """Prometheus endpoint of the node and its workers. Ray asks for no token there."""
    session_name: str
    ray_version: str
    token_path: Path
    temp_dir: Path
    idle_timeout_s: float | None
    """The head ends itself after this long without a job; None: never."""
    agent_url: str = ""
    """The node's agent, which starts jobs; empty in records of earlier versions."""
    num_cpus: int | None = None
    num_gpus: int | None = None

    def client(self, *, timeout_s: float = 30.0) -> JobClient:
        """Return a job client of this head.

        Raises:
            RuntimeFault: The token file cannot be read; a head without one is gone.
        """
        try:
            token = self.token_path.read_text()
        except OSError as error:
            raise RuntimeFault(
                f"cannot read the token of the local Ray, {self.token_path}: {error.strerror}; "
                "run `infl cluster down` and try again"
            ) from None
        return JobClient(
            self.dashboard_url, token, token_source=str(self.token_path), timeout_s=timeout_s
        )


def current_head() -> Head | None:
    """Return the live head, or None if there is none. A head that cannot start jobs is dead.

    Raises:
        RuntimeFault: The head runs but does not answer, or runs another version of Ray.
    """
    head = recorded_head()
    if head is None or not is_running(head.pid, head.create_time):
        return None
    if not _is_whole(head):
        return None
    _check_answer(head)
    return head


def remains() -> list[psutil.Process]:
    """Return the live processes of the recorded head; meant for one that is dead."""
    head = recorded_head()
    return head_processes(head.pid, head.create_time, head.temp_dir) if head is not None else []


def listens(url: str) -> bool:
    """Return whether a process of Ray is there: its dashboard, or the node's agent.

    Without the agent no job can be started, though the dashboard answers as before.

    Raises:
        RuntimeFault: It is there, but silent.
    """
    address = urlsplit(url)
    connection = http.client.HTTPConnection(
        address.hostname or "", address.port, timeout=LISTEN_DEADLINE_S
    )
    try:
        connection.request("GET", "/api/local_raylet_healthz")  # any answer will do
        connection.getresponse()
    except TimeoutError:
        raise RuntimeFault(
            f"the local Ray does not answer at {url}: end it with `infl cluster down`"
        ) from None
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def _is_whole(head: Head) -> bool:
    return listens(head.dashboard_url) and (not head.agent_url or listens(head.agent_url))


def recorded_head() -> Head | None:
    """Return the head of `head.json`, which may be dead by now; None if there is none."""
    try:
        fields = json.loads((infl_home() / "head.json").read_text())
        fields["token_path"] = Path(fields["token_path"])
        fields["temp_dir"] = Path(fields["temp_dir"])
        return Head(**fields)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def ensure_head(
    *, idle_timeout_s: float | None, num_cpus: int | None = None, num_gpus: int | None = None
) -> Head:
    """Return the live head; start one if there is none, or if it can start no job any more.

    Args:
        idle_timeout_s: The head ends itself after this long without a job. None keeps it until it
            is stopped, and also lifts the limit of a head that runs already.
        num_cpus: CPUs of a new head; None: all. A head that runs already keeps its own.
        num_gpus: The same for GPUs.

    Raises:
        RuntimeFault: The head could not be started, or the running one does not answer.
    """
    home = infl_home()
    try:
        lock = head_lock().acquire()
    except filelock.Timeout as held:
        raise RuntimeFault(f"another program keeps {held.lock_file} locked: end it first") from None
    with lock:
        head = recorded_head()
        if head is not None and is_running(head.pid, head.create_time):
            if idle_timeout_s is None:
                head = dataclasses.replace(head, idle_timeout_s=None)
            if _is_whole(head):
                _check_answer(head)
                write_record(head)  # a new modification time: the idle clock starts again
                return head
            # As the user had it.
            idle_timeout_s, num_cpus, num_gpus = head.idle_timeout_s, head.num_cpus, head.num_gpus
        if head is not None:
            stop_head(head)
        options = {
            "--idle-timeout-s": idle_timeout_s,
            "--num-cpus": num_cpus,
            "--num-gpus": num_gpus,
        }
        arguments = [f"{name}={value}" for name, value in options.items() if value is not None]
        return _start(home, arguments)


def stop_head(head: Head) -> None:
    """Stop a head and all its processes. Does nothing if the head is gone.

    Running jobs are asked to end first. Ray's own `ray stop` would end every Ray on the machine.
    """
    if is_running(head.pid, head.create_time):
        supervisor = psutil.Process(head.pid)
        supervisor.terminate()
        psutil.wait_procs([supervisor], timeout=STOP_DEADLINE_S)
    end_processes(head_processes(head.pid, head.create_time, head.temp_dir))
    forget_secrets(head.token_path.parent)
    remove_record(head.pid)


def forget_secrets(folder: Path) -> None:
    """Delete what is secret in a head's own folder: the token, and the jobs' store variables."""
    (folder / TOKEN).unlink(missing_ok=True)
    shutil.rmtree(folder / ACCESS, ignore_errors=True)


def head_processes(pid: int, create_time: float, temp_dir: Path) -> list[psutil.Process]:
    """Return the live processes of a head.

    They are the processes of the supervisor's session, and those whose environment names the head's
    temporary folder. Both tests are needed: job drivers open sessions of their own, and Ray's
    agents overwrite their environment with their title.
    """
    try:
        # If the pid belongs to another process now, the supervisor's session has no members left.
        reused = not is_same(psutil.Process(pid), create_time)
    except psutil.NoSuchProcess:
        reused = False
    found = []
    for process in psutil.process_iter():
        try:
            older = process.create_time() < create_time - CLOCK_STEP_S
            if older or process.status() == psutil.STATUS_ZOMBIE:
                continue
            in_session = not reused and os.getsid(process.pid) == pid
            if in_session or process.environ().get("RAY_TMPDIR") == str(temp_dir):
                found.append(process)
        except (psutil.Error, OSError):
            continue  # the process has ended, or belongs to another user
    return found


def end_processes(processes: list[psutil.Process], *, grace_s: float = 3.0) -> None:
    """End processes by SIGTERM, after `grace_s` by SIGKILL, and wait until they are gone."""
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=grace_s)


def write_record(head: Head) -> None:
    """Write `head.json` atomically, readable by its owner only."""
    path = infl_home() / "head.json"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix="head.")  # mode 0600
    with os.fdopen(descriptor, "w") as file:
        json.dump(dataclasses.asdict(head), file, indent=1, default=str)
    Path(temporary).replace(path)


def remove_record(pid: int) -> None:
    """Remove `head.json` if it is the record of this supervisor's head."""
    head = recorded_head()
    if head is not None and head.pid == pid:
        (infl_home() / "head.json").unlink(missing_ok=True)


def head_lock(timeout_s: float = 2 * START_DEADLINE_S) -> filelock.BaseFileLock:
    """Return the lock to hold while a head is started or retired."""
    return filelock.FileLock(infl_home() / "head.lock", timeout=timeout_s, mode=0o600)


def _new_folder(home: Path) -> Path:
    """Make a new head's folder for token, log and Ray's temporary files; clear away older ones."""
    name = secrets.token_hex(3)
    root = home / "heads"
    if len(os.fsencode(root / name / "ray")) > MAX_TEMP_DIR_LENGTH:
        of_home = hashlib.sha256(os.fsencode(home)).hexdigest()[:6]
        # private_dir refuses one that another user has made.
        root = Path("/tmp") / f"infl-{os.getuid()}-{of_home}"  # noqa: S108
    private_dir(root)
    folders = sorted(root.iterdir(), key=lambda folder: folder.stat().st_mtime)
    for old in folders[: -(KEPT_FOLDERS - 1)]:
        shutil.rmtree(old, ignore_errors=True)
    return private_dir(root / name)


def _start(home: Path, arguments: list[str]) -> Head:
    """Start a supervisor in a session of its own, so that no Ctrl-C of ours reaches it."""
    folder = _new_folder(home)
    log = folder / "head.log"
    with log.open("wb") as log_file:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "infl_cluster.supervisor", str(folder), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            cwd=home,
            env={**os.environ, "INFL_HOME": str(home)},
            start_new_session=True,
        )
    try:
        return _wait_until_ready(supervisor, log)
    except BaseException:
        supervisor.terminate()
        supervisor.wait()
        raise


def _wait_until_ready(supervisor: "subprocess.Popen[bytes]", log: Path) -> Head:
    """Wait until the supervisor has recorded its head.

    Raises:
        RuntimeFault: It ended instead, or took too long.
    """
    # The supervisor has its own deadline and says why it failed. This one is for one that hangs.
    deadline = time.monotonic() + START_DEADLINE_S + STOP_DEADLINE_S
    while supervisor.poll() is None and time.monotonic() < deadline:
        head = recorded_head()
        if head is not None and head.pid == supervisor.pid:
            return head
        time.sleep(0.1)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "nothing was logged"
    raise RuntimeFault(f"the local Ray did not start: {last}; see {log}")


def _check_answer(head: Head) -> None:
    """Ask a head for its session and version.

    Raises:
        RuntimeFault: No answer, or another one than was recorded.
    """
    try:
        answer = head.client(timeout_s=ANSWER_DEADLINE_S).version()
    except RuntimeFault as fault:
        raise RuntimeFault(
            f"the local Ray (pid {head.pid}) does not answer, end it with `infl cluster down`: "
            f"{fault}"
        ) from None
    if answer["session_name"] != head.session_name:
        raise RuntimeFault(
            f"another Ray listens at {head.dashboard_url}, end ours with `infl cluster down`"
        )
    ours = importlib.metadata.version("ray")
    if answer["ray_version"] != ours:
        raise RuntimeFault(
            f"the local Ray is version {answer['ray_version']}, this program has {ours}: "
            "end it with `infl cluster down`"
        )
