"""The progress of a run in a notebook: one output that is updated in place."""

import sys
from html import escape
from typing import Any

from influence_jobs.store.status import progress_line
from influence_jobs.terms import duration

_BAR = '<progress value="{done}" max="{total}" style="width: 12em; vertical-align: middle">'


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


class NotebookProgress:
    """A line for each run under way. Once it has ended, it says how.

    The output is HTML and plain text, and needs no widgets: it stays in the saved notebook.
    """

    def __init__(self) -> None:
        self._statuses: dict[str, dict[str, Any]] = {}
        self._handle: Any = None
        self._shown: dict[str, str] = {}

    def show(self, name: str, status: dict[str, Any]) -> None:
        """Show the status of a run under a name."""
        if status["units_total"] or status["state"] == "failed":
            self._statuses[name] = status
            self._draw(left=False)

    def close(self) -> None:
        """Leave the output as it is to stay."""
        if self._statuses:
            self._draw(left=True)

    def _draw(self, *, left: bool) -> None:
        import IPython.display

        display: Any = IPython.display.display  # half typed
        lines = [_line(name, status, left=left) for name, status in self._statuses.items()]
        bundle = {
            "text/html": "".join(f"<div>{html}</div>" for html, _ in lines),
            "text/plain": "\n".join(text for _, text in lines),
        }
        if bundle == self._shown:
            return
        self._shown = bundle
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def _line(name: str, status: dict[str, Any], *, left: bool) -> tuple[str, str]:
    """What is shown of a run, as HTML and as text.

    Args:
        left: Whether nobody watches any more.
    """
    state, bar = status["state"], ""
    done, total = status["units_done"], status["units_total"] or 0
    percent = f"{100 * done // total}%" if total else "0%"
    if state == "done":
        took = status["updated_at"] - status["started_at"]
        said = f"done, {total:,} samples in {duration(took)}"
    elif state in ("new", "running") and not left:
        bar = _BAR.format(done=done, total=total) + "</progress> "
        said = ", ".join(filter(None, [f"{percent}  {progress_line(status)}", status["message"]]))
    elif state == "failed":
        said = f"failed at {percent}: {status['message']}"
    else:
        goes_on = state in ("new", "running")
        said = f"{'goes on in the background' if goes_on else state}, at {percent}"
        said += "" if goes_on else "; the same call goes on from there"
    return f"<code>{escape(name)}</code>: {bar}{escape(said)}", f"{name}: {said}"
