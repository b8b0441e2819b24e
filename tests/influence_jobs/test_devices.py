"""How many threads this process takes."""

import pytest

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
