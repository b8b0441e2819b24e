"""A lease ensures that only one driver writes to a run.

The lease is a file. A driver creates it only if it is absent, and then rewrites it as a heartbeat.
A holder on this host is dead once its process has ended. A holder on another host is taken for
dead if it has not rewritten the file for `TTL_S`; since clocks differ, it is then watched for some
heartbeats before it loses the lease. What holds of all this, and what does not, is in
docs/protocol.md; tests/protocol tries every order of events.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Self

import psutil

from influence_jobs.errors import StoreError
from influence_jobs.store import layout
from influence_jobs.store.documents import MOST_BYTES, Holder, parsed
from influence_jobs.store.files import Files
from influence_jobs.store.object_files import StorageError
from influence_jobs.store.process import is_running

TTL_S = 30.0
BEAT_S = 5.0
WATCH_S = 12.0  # a live holder has a heartbeat in it
# A network file system shows a file that is new, or was replaced, so late: NFS keeps what it has
# seen of a folder for up to 60 seconds.
SHOWN_S = 70.0
NO_FOLDER_S = 10.0  # so long a folder is waited for of which nothing is there
CLOCKS_S = 3600.0  # clocks do not differ by so much


class LeaseHeld(StoreError):
    """Another live driver holds the run.

    Cure: wait for it (`infl status RUN --follow`), or end it with `infl stop RUN`.
    """


class Lease:
    """Hold a run while the `with` block lasts.

    Raises:
        LeaseHeld: On entering, if another driver holds it.
        StoreError: On entering, if the lease cannot be understood.
    """

    def __init__(self, files: Files):
        self._files = files
        self._owner = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")
        self.lost = threading.Event()

    def __enter__(self) -> Self:
        while not self._created(layout.LEASE):
            holder = self._read(layout.LEASE)
            if holder is not None:  # else the holder has just given it back
                self._take_over(holder)
                break
        self._thread.start()
        return self

    def _take_over(self, holder: Holder) -> None:
        """Become the only successor of a dead holder.

        Only one driver can create the *claim*, a file that names the holder; it becomes the
        successor. It may die before it has replaced the lease; then its own successor is found in
        the same way. Claims are deleted only after the lease has changed. So a slow contender that
        read the old lease sees that the lease has changed, and gives up.
        """
        claims: list[str] = []
        last = holder
        while True:
            if not self._is_dead(last, claims[-1] if claims else layout.LEASE):
                raise LeaseHeld(
                    f"another process is writing {self._files.url}: process {last['pid']} on "
                    f"{last['host']}; wait for it, or stop it with `infl stop`"
                )
            claims.append(f"{layout.LEASE}.{last['owner']}")
            if self._created(claims[-1]):
                break
            successor = self._read(claims[-1])
            if successor is None:
                raise LeaseHeld(f"another driver has just taken over {self._files.url}")
            last = successor
        current = self._read(layout.LEASE)
        if current is None or current["owner"] != holder["owner"]:
            self._files.delete(claims[-1])
            raise LeaseHeld(f"another driver has just taken over {self._files.url}")
        self._files.write(layout.LEASE, self._text())
        for claim in claims:
            self._files.delete(claim)

    def _is_dead(self, holder: Holder, name: str) -> bool:
        """Whether the holder that a file names may be succeeded. Takes `WATCH_S` if in doubt."""
        if holder["host"] == socket.gethostname():
            return not is_alive(holder)
        age = time.time() - holder["beat"]
        if abs(age) < TTL_S:
            return False
        if age < CLOCKS_S:
            time.sleep(WATCH_S)
            return self._read(name) == holder
        return True

    def _created(self, name: str) -> bool:
        """Create a file that names us, if it is absent.

        An object store may write it and lose the answer. Then a retry finds the file there, and it
        is ours.
        """
        if self._files.create(name, self._text()):
            return True
        found = self._read(name)
        return found is not None and found["owner"] == self._owner

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError, StoreError):  # the lease also expires by itself
            if not self.lost.is_set() and self._is_ours():
                self._files.delete(layout.LEASE)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                holder = self._read(layout.LEASE)
                if holder is not None and holder["owner"] == self._owner:
                    self._files.write(layout.LEASE, self._text())
                elif holder is not None or not self._created(layout.LEASE):
                    self.lost.set()
                    return
            except (OSError, StoreError):
                continue  # the disk is full or slow: the work itself will report that

    def _is_ours(self) -> bool:
        holder = self._read(layout.LEASE)
        return holder is not None and holder["owner"] == self._owner

    def _read(self, name: str) -> Holder | None:
        return holder_of(self._files, name)

    def _text(self) -> bytes:
        return json.dumps(
            {
                "owner": self._owner,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process_started": psutil.Process().create_time(),
                "beat": time.time(),
            }
        ).encode()


def holder_of(files: Files, name: str = layout.LEASE) -> Holder | None:
    """The driver that a lease or a claim names; None if there is no such file.

    Raises:
        StoreError: It is damaged.
    """
    try:
        data = files.read(name, most=MOST_BYTES)
    except FileNotFoundError:
        return None
    return parsed(data, Holder, f"{files.url}/{name}")


def require_held_by(files: Files, owner: str) -> None:
    """Refuse a folder that is not the one in which a driver holds its lease.

    On another machine the same path may lead to another disk, which may even have a run of the
    same name.

    Args:
        owner: Of the driver's lease.

    Raises:
        StoreError: It is another folder, or there is none.
    """
    began = time.monotonic()
    while True:
        try:
            holder = holder_of(files)
        except StorageError:  # which has been asked for minutes
            raise
        except OSError:  # it is being replaced
            holder = None
        if holder is not None and holder["owner"] == owner:
            return
        if time.monotonic() - began > (NO_FOLDER_S if holder is None else SHOWN_S):
            raise StoreError(
                f"{files.url} is not the folder of the run there, but another one or none: put the "
                "runs on storage that all nodes share, and name that with --runs"
            )
        time.sleep(0.5)


def is_alive(holder: Holder) -> bool:
    """Whether a lease's holder may still be writing."""
    if holder["host"] == socket.gethostname():
        return is_running(holder["pid"], float(holder["process_started"]))
    return time.time() - float(holder["beat"]) < TTL_S


def live_holder(files: Files) -> Holder | None:
    """The holder of the lease of a run's folder, if it is alive; else None.

    Raises:
        StoreError: The lease is damaged.
    """
    holder = holder_of(files)
    return holder if holder is not None and is_alive(holder) else None
