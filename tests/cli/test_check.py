"""`infl init` and `infl check`, as a user begins."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from influence_jobs.contract import jobs

Infl = Callable[..., Any]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PROBE_S", 0.0)
    monkeypatch.delitem(sys.modules, "begun_here", raising=False)


def test_a_new_task_works_as_it_stands(infl: Infl, tmp_path: Path) -> None:
    begun = infl("init", "begun_here.py")
    assert (begun.code, begun.out) == (
        0,
        "begun_here.py is written; next: infl check begun_here.py:MyTask\n",
    )
    text = (tmp_path / "begun_here.py").read_text()
    assert len(text.splitlines()) < 60
    assert "template" not in text
    checked = infl("check", "begun_here.py:MyTask", "--width", 4, "--json")
    assert checked.code == 0, checked.out
    assert {finding["mark"] for finding in checked.json["findings"]} == {"ok"}
    said = infl("check", "begun_here.py:MyTask", "--width", 4).out.splitlines()[-1]
    assert said == (
        "next: infl submit influence --task begun_here.py:MyTask --width 4 --test 0 --local"
    )
    assert "\nok    parameters: 690 numbers in 4 parameters are trained\n" in checked.out
    words = ("--task", "begun_here.py:MyTask", "--width", 2, "--epochs", 1, "--local")
    found = infl("submit", "influence", *words, "--test", 0, "--solver", "ek-fac")
    assert found.code == 0, found.err
    assert not (tmp_path / "runs" / "nothing").exists()


def test_init_never_overwrites(infl: Infl, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1\n")
    refused = infl("init", "mine.py")
    assert (refused.code, refused.err) == (
        2,
        "error: mine.py is there already: choose another name\n",
    )
    assert (tmp_path / "mine.py").read_text() == "x = 1\n"
    assert "there is no folder nowhere: make it first" in infl("init", "nowhere/mine.py").err
    for name in ("mine", "my-task.py", "2.py"):
        assert "cannot be imported: name it like my_task.py" in infl("init", name).err


def test_what_fails_leaves_with_2(infl: Infl, tmp_path: Path) -> None:
    infl("init", "begun_here.py")
    file = tmp_path / "begun_here.py"
    file.write_text(file.read_text().replace(', reduction="none"', ""))
    checked = infl("check", "begun_here.py:MyTask", "--json")
    assert checked.code == 2
    assert checked.json["failed"] == ["losses"]
    assert (
        "\nfail  losses: losses() has shape (), not (15,): one number for the whole " in checked.out
    )
    assert checked.err == ""
    assert (
        "there is no option --wdth here" in infl("check", "begun_here.py:MyTask", "--wdth", 3).err
    )
