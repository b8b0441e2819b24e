"""How many threads this process takes."""

import os
import subprocess
import sys

import pytest

from infl_cluster.pool import _worker_environment
from influence_jobs import devices


@pytest.mark.parametrize(
    ("asked", "taken"), [("", 4), ("1", 1), ("3", 3), ("9", 4), ("0", 4), ("many", 4)]
)
def test_threads_are_those_that_were_asked_for(
    asked: str, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert devices.threads() == taken


def test_idle_threads_sleep_soon_unless_the_user_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, kept in (({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5")):
        monkeypatch.setattr(os, "environ", dict(given))
        # Workers inherit what is not set for them.
        assert _worker_environment(1).get("GOMP_SPINCOUNT", kept) == kept
        devices.let_idle_threads_sleep()
        assert os.environ == {"GOMP_SPINCOUNT": kept}
    monkeypatch.setattr(os, "environ", {"OMP_WAIT_POLICY": "active"})
    devices.let_idle_threads_sleep()
    assert os.environ == {"OMP_WAIT_POLICY": "active"}
    program = (
        "import sys; from infl_cli import entry; entry._main = lambda: None; entry.main(); "
        "import os; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    )
    monkeypatch.undo()
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.stdout == "False 10000\n", run.stderr
