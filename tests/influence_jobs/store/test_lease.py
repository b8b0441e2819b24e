import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from influence_jobs.errors import StoreError
from influence_jobs.store import lease as lease_module
from influence_jobs.store.documents import Holder
from influence_jobs.store.files import LocalFiles
from influence_jobs.store.lease import Lease, LeaseHeld, holder_of, is_alive, require_held_by
from influence_jobs.store.object_files import StorageError


def hold(folder: str, ready: "multiprocessing.synchronize.Event") -> None:
    with Lease(LocalFiles(Path(folder))):
        ready.set()
        time.sleep(60)


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    with Lease(files), pytest.raises(LeaseHeld, match=f"process {os.getpid()} on "), Lease(files):
        pass
    assert holder_of(files) is None
    with Lease(files):  # released, so it can be taken again
        pass


def test_the_lease_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(30)
    files = LocalFiles(tmp_path)
    with pytest.raises(LeaseHeld), Lease(files):
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with Lease(files):
        holder = holder_of(files)
        assert holder is not None
        assert holder["pid"] == os.getpid()


def test_a_silent_holder_elsewhere_loses_it_after_the_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "WATCH_S", 0.05)
    files = LocalFiles(tmp_path)
    holder = {
        "owner": "x",
        "host": "elsewhere",
        "pid": 1,
        "process_started": 0.0,
        "beat": time.time(),
    }
    files.write("lease.json", json.dumps(holder).encode())
    with pytest.raises(LeaseHeld), Lease(files):
        pass
    holder["beat"] = time.time() - lease_module.TTL_S - 1
    files.write("lease.json", json.dumps(holder).encode())
    with Lease(files):
        pass


@pytest.mark.parametrize("age", [40.0, -3000.0])
def test_a_holder_whose_clock_differs_keeps_it_as_long_as_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float
) -> None:
    files = LocalFiles(tmp_path)
    beat = time.time() - age
    files.write("lease.json", dead_holder("live", beat=beat))

    def watched(seconds: float) -> None:
        assert seconds == lease_module.WATCH_S
        files.write("lease.json", dead_holder("live", beat=beat + lease_module.BEAT_S))

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", watched)
        with pytest.raises(LeaseHeld, match="process 1 on elsewhere"), Lease(files):
            pass
    monkeypatch.setattr(lease_module, "WATCH_S", 0.0)
    with Lease(files):  # it writes no more
        pass


def test_a_lease_that_somebody_deleted_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "BEAT_S", 0.02)
    files = LocalFiles(tmp_path)
    with Lease(files) as lease:
        files.delete("lease.json")
        deadline = time.monotonic() + 20
        while holder_of(files) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not lease.lost.is_set()
    assert files.names("") == []


def test_a_reused_process_id_is_not_the_holder(tmp_path: Path) -> None:
    with Lease(LocalFiles(tmp_path)):
        holder = holder_of(LocalFiles(tmp_path))
    assert holder is not None
    later: Holder = {**holder, "process_started": holder["process_started"] - 100}
    assert not is_alive(later)


def test_a_driver_that_lost_its_lease_notices_and_leaves_the_new_holders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "BEAT_S", 0.02)
    files = LocalFiles(tmp_path)
    with Lease(files) as lease:
        thief = {"owner": "thief", "host": "elsewhere", "pid": 1, "process_started": 0, "beat": 0}
        files.write("lease.json", json.dumps(thief).encode())
        assert lease.lost.wait(5)
    holder = holder_of(files)
    assert holder is not None
    assert holder["owner"] == "thief"


def dead_holder(owner: str = "dead", **fields: Any) -> bytes:
    holder = {"owner": owner, "host": "elsewhere", "pid": 1, "process_started": 0.0, "beat": 0.0}
    return json.dumps({**holder, **fields}).encode()


def test_a_zombie_holds_no_lease() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        holder: Holder = {
            "owner": "one",
            "host": socket.gethostname(),
            "beat": 0.0,
            "pid": process.pid,
            "process_started": psutil.Process(process.pid).create_time(),
        }
        assert is_alive(holder)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.pid_exists(process.pid)
        assert not is_alive(holder)


class Paused(LocalFiles):
    """Files that pause before the first call of an operation."""

    def __init__(self, root: Path, before: str):
        super().__init__(root)
        self._before = before
        self.reached, self.go_on = threading.Event(), threading.Event()

    def _pause(self, operation: str, name: str) -> None:
        if (operation, name.startswith("lease.json.")) == (self._before, operation == "create"):
            self.reached.set()
            assert self.go_on.wait(30)
            self._before = ""

    def create(self, name: str, data: bytes) -> bool:
        self._pause("create", name)
        return super().create(name, data)

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        self._pause("write", name)
        super().write(name, data, durable=durable)


@pytest.mark.parametrize("before", ["create", "write"])
def test_of_two_that_saw_the_dead_holder_one_wins_however_slow(tmp_path: Path, before: str) -> None:
    slow, fast = Paused(tmp_path, before), LocalFiles(tmp_path)
    fast.write("lease.json", dead_holder())
    refused, held, leave = threading.Event(), threading.Event(), threading.Event()

    def contend() -> None:
        try:
            with Lease(slow):
                held.set()
                assert leave.wait(30)
        except LeaseHeld:
            refused.set()

    thread = threading.Thread(target=contend)
    thread.start()
    assert slow.reached.wait(30)
    if before == "create":  # it has read the dead holder's lease, and claims it after another
        with Lease(fast) as lease:
            slow.go_on.set()
            assert refused.wait(30)
            holder = holder_of(fast)
            assert holder is not None
            assert holder["owner"] == lease._owner
    else:  # it has claimed the lease, and nobody else may
        with pytest.raises(LeaseHeld), Lease(fast):
            pass
        slow.go_on.set()
        assert held.wait(30)
    leave.set()
    thread.join()
    assert list(tmp_path.iterdir()) == []


def test_a_successor_that_died_in_between_is_succeeded(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.write("lease.json", dead_holder("first"))
    files.write("lease.json.first", dead_holder("second"))
    with Lease(files) as lease:
        holder = holder_of(files)
        assert holder is not None
        assert holder["owner"] == lease._owner
    assert list(tmp_path.iterdir()) == []


def test_errors_of_storage_do_not_end_the_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "BEAT_S", 0.02)
    files = LocalFiles(tmp_path)
    original = files.read
    failures: list[bytes | OSError] = [OSError(5, "no answer"), b"half a le", OSError(5, "again")]

    def failing(name: str, **options: Any) -> bytes:
        if not failures:
            return original(name)
        failure = failures.pop()
        if isinstance(failure, OSError):
            raise failure
        return failure

    with Lease(files) as lease:
        before = json.loads(original("lease.json"))["beat"]
        monkeypatch.setattr(files, "read", failing)
        deadline = time.monotonic() + 30
        while json.loads(original("lease.json"))["beat"] == before:
            assert time.monotonic() < deadline
            assert not lease.lost.is_set()
            time.sleep(0.01)
        assert failures == []
        assert not lease.lost.is_set()


def test_a_damaged_lease_is_told(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.write("lease.json", b"{")
    with pytest.raises(StoreError, match=r"lease\.json is damaged .*: delete it"), Lease(files):
        pass


def test_the_same_path_may_be_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines with a disk each, and a run of one name on both."""
    for name in ("SHOWN_S", "NO_FOLDER_S"):
        monkeypatch.setattr(lease_module, name, 0.0)
    here, there = LocalFiles(tmp_path / "here"), LocalFiles(tmp_path / "there")
    with Lease(here):
        holder = holder_of(here)
        assert holder is not None
        require_held_by(here, holder["owner"])
        with pytest.raises(StoreError, match="there is not the folder of the run there"):
            require_held_by(there, holder["owner"])
        with Lease(there), pytest.raises(StoreError, match="that all nodes share"):
            require_held_by(there, holder["owner"])
    monkeypatch.setattr(lease_module, "NO_FOLDER_S", 60.0)  # a folder that shows a file late
    waits = threading.Timer(0.2, lambda: here.write("lease.json", json.dumps(holder).encode()))
    waits.start()
    require_held_by(here, holder["owner"])
    waits.join()

    class Down(LocalFiles):
        def read(self, name: str, *, most: int | None = None) -> bytes:
            raise StorageError("s3://runs does not answer")

    with pytest.raises(StorageError, match="does not answer"):  # not: another folder
        require_held_by(Down(tmp_path / "here"), holder["owner"])
