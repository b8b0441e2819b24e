"""One driver a run: whoever holds the lease may write.

The lease is a file created only if absent and rewritten as a heartbeat. A holder that has not been heard of for
`TTL_S`, or whose process is gone from this host, has lost it.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any, Self

import psutil

from influence_jobs.errors import StoreError
from influence_jobs.store import layout
from influence_jobs.store.files import Files
from influence_jobs.store.process import is_running

TTL_S = 30.0
BEAT_S = 5.0


class LeaseHeld(StoreError):
    """Another live driver holds the run."""


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
        while not self._files.create(layout.LEASE, self._text()):
            holder = self._read(layout.LEASE)
            if holder is not None:  # else it was given back just now
                self._take_over(holder)
                break
        self._thread.start()
        return self

    def _take_over(self, holder: dict[str, Any]) -> None:
        """Become the one successor of a dead holder.

        Whoever creates the claim on a holder succeeds it; a successor that died before it had replaced
        the lease is succeeded the same way. Claims go away only after the lease has changed, which
        tells a contender that read it earlier, however slow, that it comes too late.
        """
        claims: list[str] = []
        last = holder
        while True:
            if is_alive(last):
                raise LeaseHeld(
                    f"another driver is writing {self._files.url}: process {last['pid']} on "
                    f"{last['host']}; wait for it, or stop it with `infl stop`"
                )
            claims.append(f"{layout.LEASE}.{last['owner']}")
            if self._files.create(claims[-1], self._text()):
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError, StoreError):  # the lease runs out by itself
            if not self.lost.is_set() and self._is_ours():
                self._files.delete(layout.LEASE)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                if not self._is_ours():
                    self.lost.set()
                    return
                self._files.write(layout.LEASE, self._text())
            except (OSError, StoreError):
                continue  # a full or slow disk: the work itself will report it

    def _is_ours(self) -> bool:
        holder = self._read(layout.LEASE)
        return holder is not None and holder["owner"] == self._owner

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            holder: dict[str, Any] = json.loads(self._files.read(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(f"{self._files.url}/{name} is damaged: delete it") from error
        return holder

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


def holder_of(files: Files) -> dict[str, Any] | None:
    """What the lease says: owner, host, pid, process_started, beat; None if nobody holds it."""
    try:
        holder: dict[str, Any] = json.loads(files.read(layout.LEASE))
    except (FileNotFoundError, ValueError):
        return None
    return holder


def is_alive(holder: dict[str, Any]) -> bool:
    """Whether a lease's holder may still be writing."""
    if holder["host"] == socket.gethostname():
        return is_running(holder["pid"], float(holder["process_started"]))
    return time.time() - float(holder["beat"]) < TTL_S


def live_holder(files: Files) -> dict[str, Any] | None:
    """Who is driving the run of a folder; None if nobody is."""
    holder = holder_of(files)
    return holder if holder is not None and is_alive(holder) else None
