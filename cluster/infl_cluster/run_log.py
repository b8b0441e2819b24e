"""The log of a driver, kept in the run folder: a head and its logs may be deleted at any time."""

import contextlib
import logging
import time
from collections.abc import Iterator

from influence_jobs.errors import InflError
from influence_jobs.store import layout
from influence_jobs.store.run import Run


class _RunLogHandler(logging.Handler):
    """Rewrites one small file for each record: object stores cannot append."""

    def __init__(self, run: Run):
        super().__init__(logging.INFO)
        self._run = run
        self._name = f"{layout.LOGS}/driver-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.log"
        self._lines: list[str] = []
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))
        with contextlib.suppress(OSError):  # a full disk must not hide the error being logged
            self._run.files.write(self._name, "\n".join(self._lines).encode() + b"\n")


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
