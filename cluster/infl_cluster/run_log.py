"""The log of a driver, kept in the run folder: a head and its logs may be deleted at any time."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from influence_jobs.errors import InflError, StoreError
from influence_jobs.store import layout
from influence_jobs.store.run import Run

WRITE_EVERY_S = 1.0
PART_BYTES = 2**16  # of a log's file; a longer log goes on in the next one


class _RunLogHandler(logging.Handler):
    """Writes records to files within a second.

    Object stores cannot append, so that a file is written as a whole each time. Files are small,
    and so a long log costs no more for each record than a short one.
    """

    def __init__(self, run: Run):
        super().__init__(logging.INFO)
        self._run = run
        self._name = f"{layout.LOGS}/driver-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
        self._part, self._text = 1, b""
        self._unwritten = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="log")
        self._thread.start()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._text += self.format(record).encode(errors="replace") + b"\n"
        self._unwritten = True
        if len(self._text) >= PART_BYTES:
            self._write()
            if not self._unwritten:
                self._part, self._text = self._part + 1, b""

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        with self.lock or contextlib.nullcontext():
            self._write()
        super().close()

    def _beat(self) -> None:
        while not self._stop.wait(WRITE_EVERY_S):
            with self.lock or contextlib.nullcontext():
                self._write()

    def _write(self) -> None:
        if not self._unwritten:
            return
        # A full disk, or a link in the folder, must not hide the error being logged.
        with contextlib.suppress(OSError, StoreError):
            self._run.files.write(f"{self._name}-{self._part:06d}.log", self._text)
            self._unwritten = False


@contextlib.contextmanager
def run_log(run: Run) -> Iterator[None]:
    """Write the records of our loggers to the run's log, for the length of a `with` block."""
    handler = _RunLogHandler(run)
    loggers = [logging.getLogger(name) for name in ("infl_cluster", "influence_jobs")]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    except Exception as error:
        ours = isinstance(error, InflError)  # any other error needs its traceback
        logging.getLogger("infl_cluster").error("%s", error, exc_info=not ours)
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
