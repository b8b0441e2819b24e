"""Show the progress of a run. It is read from the run's folder, wherever the driver is."""

import re
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from infl_cluster.notebook import NotebookProgress, in_notebook
from influence_jobs.errors import first_line
from influence_jobs.store.run import Run
from influence_jobs.store.status import named, progress_line, read_status, under_way

POLL_S = 0.5
_DIGITS = re.compile(r"\d+")
LINE_EVERY_S = 10.0  # without a terminal, lines replace the bar


class Shows(Protocol):
    """Shows the runs that are watched."""

    def show(self, name: str, status: dict[str, Any]) -> None:
        """Show the status of a run under a name."""

    def close(self) -> None:
        """Stop; what is shown stays."""


class _Nothing:
    def show(self, name: str, status: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class Progresses:
    """A progress bar for each run under way: the requested one and those that it needs."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[note]}"),
            console=Console(stderr=True),
            transient=False,
        )
        self._tasks: dict[str, TaskID] = {}
        self._drawn = sys.stderr.isatty()
        self._said: str | None = None
        self._last_line = time.monotonic()
        if self._drawn:
            self._bars.start()

    def close(self) -> None:
        """Stop drawing; the bars stay on the screen."""
        if self._drawn:
            self._bars.stop()

    def show(self, name: str, status: dict[str, Any]) -> None:
        """Show the progress of a run, and what it waits for."""
        message = status.get("message")
        # Numbers in it grow every second.
        if message and status["state"] == "running" and _DIGITS.sub("", message) != self._said:
            self._said = _DIGITS.sub("", message)
            self._say(f"{name}: {message}")
        total, done = status["units_total"], status["units_done"]
        if not total:
            return
        note = progress_line(status)
        if self._drawn:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total, note="")
            self._bars.update(self._tasks[name], completed=done, total=total, note=note)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._say(f"{name} {100 * done // total}%  {note}")


def watch(
    run: Run,
    *,
    ended: Callable[[], str | None],
    say: Callable[[str], None],
    quiet: bool = False,
    pause: Callable[[float], object] = time.sleep,
) -> dict[str, Any]:
    """Show progress until the run has ended; returns its last status.

    Args:
        ended: Called about once a second; returns why the run's driver is gone, or None. The run's
            own status cannot say that.
        say: Takes lines for the user if there is no terminal.
        quiet: Show nothing.
        pause: Waits for some seconds, or until the run has ended.
    """
    bars: Shows = _Nothing() if quiet else NotebookProgress() if in_notebook() else Progresses(say)
    asked = time.monotonic()
    last = run
    try:
        while True:
            status = _status(run)
            shown, its = _under_way(run, status)
            if last.id not in (shown.id, run.id):  # a needed one has ended
                bars.show(named(last.id, status), _status(last))
            last = shown
            bars.show(named(shown.id, status), its)
            if status["state"] not in ("new", "running", "interrupted"):
                return status
            if time.monotonic() - asked > 1:
                asked = time.monotonic()
                why = ended()
                if why is not None:
                    status = _status(run)
                    if status["state"] in ("new", "running", "interrupted"):
                        # What a running one said was of that moment.
                        last_word = status["state"] == "interrupted" and status.get("message")
                        status |= {"state": "interrupted", "message": last_word or why}
                    return status
            pause(POLL_S)
    finally:
        bars.close()


def _status(run: Run) -> dict[str, Any]:
    """The status of a run; a store that does not answer for a while does not end the run."""
    try:
        return read_status(run)
    except OSError as error:
        nothing = {"units_done": 0, "units_total": None}
        return {"state": "running", "message": f"no status: {first_line(error)}", **nothing}


def _under_way(run: Run, status: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    try:
        return under_way(run, status)
    except OSError:
        return run, status
