"""What is shown of a run and of those that it needs, while it is watched."""

from types import SimpleNamespace
from typing import Any

import pytest

from infl_cluster import watch as watching
from infl_cluster.notebook import NotebookProgress, in_notebook


def a_status(state: str, done: int, **more: Any) -> dict[str, Any]:
    counts = {"shards_done": 0, "shards_total": 1, "failures": {}, "message": None}
    times = {"started_at": 0.0, "updated_at": 61.0, "work_started_at": 0.0}
    return {"state": state, "units_done": done, "units_total": 10, **counts, **times, **more}


NEEDED: Any = SimpleNamespace(id="train-x")
WANTED: Any = SimpleNamespace(id="influence-x")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch):
    """A run that waits for another, which is last seen under way at 7 of 10."""
    needs = ["train-x"]
    waits = a_status("running", 0, units_total=None, phase=NEEDED.id, needs=needs)
    of_wanted = [
        waits,
        waits,
        *(a_status(*at, needs=needs) for at in (("running", 5), ("done", 10))),
    ]
    of_needed = [a_status("running", 3), a_status("running", 7), a_status("done", 10)]

    def status(run):
        of = of_wanted if run is WANTED else of_needed
        return of.pop(0) if len(of) > 1 else of[0]

    monkeypatch.setattr(watching, "_status", status)
    monkeypatch.setattr(
        watching,
        "_under_way",
        lambda run, found: (NEEDED, status(NEEDED)) if found.get("phase") else (run, found),
    )
    monkeypatch.setattr(watching, "POLL_S", 0)

    def watch(**options):
        return watching.watch(WANTED, ended=lambda: None, say=print, **options)

    return watch


def test_a_needed_run_is_shown_to_its_end(watched, monkeypatch) -> None:
    shown: list[tuple[str, str, int]] = []
    bars = SimpleNamespace(
        show=lambda name, status: shown.append((name, status["state"], status["units_done"])),
        close=lambda: shown.append(("closed", "", 0)),
    )
    monkeypatch.setattr(watching, "Progresses", lambda say: bars)
    assert watched()["state"] == "done"
    assert shown == [
        ("train-x (1 of 2)", "running", 3),
        ("train-x (1 of 2)", "running", 7),
        ("train-x (1 of 2)", "done", 10),
        ("influence-x (2 of 2)", "running", 5),
        ("influence-x (2 of 2)", "done", 10),
        ("closed", "", 0),
    ]


def test_quiet_shows_nothing_on_a_terminal_either(watched, monkeypatch, capfd) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert watched(quiet=True)["state"] == "done"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (a_status("done", 10), "done, 10 samples in 1:01"),
        (a_status("stopped", 4), "stopped, at 40%; the same call goes on from there"),
        (a_status("interrupted", 4), "interrupted, at 40%; the same call goes on from there"),
        (a_status("running", 4), "goes on in the background, at 40%"),
        (a_status("new", 4), "goes on in the background, at 40%"),
        (a_status("failed", 4, message="<b> no room"), "failed at 40%: <b> no room"),
        (a_status("failed", 0, units_total=None, message="why"), "failed at 0%: why"),
    ],
)
def test_the_last_line_says_how_it_is(monkeypatch, status, said) -> None:
    display = pytest.importorskip("IPython.display", reason="no IPython")
    kept: list[dict[str, str]] = []
    handle = SimpleNamespace(update=lambda bundle, raw: kept.append(bundle))
    monkeypatch.setattr(
        display,
        "display",
        lambda bundle, **_: kept.append(bundle) or handle,  # type: ignore[func-returns-value]
    )
    progress = NotebookProgress()
    progress.show(WANTED.id, status)
    progress.close()
    assert kept[-1]["text/plain"] == f"influence-x: {said}"
    assert "<b>" not in kept[-1]["text/html"]
    assert "<progress" not in kept[-1]["text/html"]


def test_this_process_is_no_notebook() -> None:
    assert not in_notebook()
