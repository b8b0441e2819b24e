"""Texts from a run folder do nothing to the terminal that shows them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from influence_jobs.store.find import run_ids
from influence_jobs.store.run import Run
from influence_jobs.terms import LONGEST, in_a_line, shown

# Clears the screen, writes the clipboard, hides text, turns the direction of reading, goes back.
HOSTILE = "\x1b[2J\x1b]52;c;cm0=\x07\x9b8m\u202egnp.exe\r\x08\x00 next: infl resume"
SEEN = "\\x1b[2J\\x1b]52;c;cm0=\\x07\\x9b8m\\u202egnp.exe"


def obeyed(text: str) -> set[str]:
    """Characters that a terminal would not show."""
    return {c for c in text if (not c.isprintable() and c != "\n") or c in "\u202e\u2066"}


@pytest.fixture
def strange(runs: Path) -> Run:
    """A run whose status, failures, log and table are hostile."""
    (run_id,) = (i for i in run_ids(str(runs)) if i.startswith("grad-norms"))
    run = Run.open(str(runs), run_id)
    status = json.loads(run.files.read("status.json"))
    failures = {"a": HOSTILE + "\nstatus  done", HOSTILE: "x" * 10**6}
    status |= {"state": "failed", "message": HOSTILE + "\nnext  rm -r .", "failures": failures}
    run.write_json("status.json", status)
    run.files.write("logs/driver-1.log", HOSTILE.encode() + b"\n\xff\n")
    samples = run.read_table("samples")
    labels = pa.array([HOSTILE] * len(samples))
    run.write_table("samples", samples.set_column(1, "label", labels))
    return run


@pytest.mark.parametrize(
    "words", [("status",), ("status", "--json"), ("logs",), ("top", "--k", "3"), ("verify",)]
)
def test_no_command_passes_on_what_a_terminal_obeys(
    infl: Callable[..., Any], strange: Run, words: tuple[str, ...]
) -> None:
    if words[0] == "top":  # which shows what is finished
        status = json.loads(strange.files.read("status.json"))
        strange.write_json("status.json", {**status, "state": "done"})
    answer = infl(words[0], strange.id, *words[1:])
    assert obeyed(answer.out) | obeyed(answer.err) == set()
    assert max(map(len, answer.out.splitlines() or [""])) < 2 * LONGEST or "--json" in words
    assert SEEN in answer.out or words[0] == "verify" or "--json" in words


def test_a_line_stays_a_line(infl: Callable[..., Any], strange: Run) -> None:
    lines = infl("status", strange.id).out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("status", "next"))] == [
        "status",
        "next",
    ]
    assert lines[-1].endswith(f"infl resume {strange.id}")


def test_names_of_folders_and_errors_are_shown_as_text(
    infl: Callable[..., Any], strange: Run
) -> None:
    other = Path(strange.root, "train-\x1b[2J-abc")
    shutil.copytree(strange.files.url, other)
    for words in (("runs",), ("status", other.name), ("top", HOSTILE), ("report", HOSTILE)):
        answer = infl(*words)
        assert obeyed(answer.out) | obeyed(answer.err) == set()
        assert answer.err.count("\n") <= 1


def test_what_is_seen_stays_as_it_is() -> None:
    text = "Größe 3.5 µm, 日本語, tab\tline\nfamily 👩\u200d👧"
    assert shown(text) == text
    assert in_a_line("a\n  b\tc") == "a b c"
    half = LONGEST // 2
    assert in_a_line("x" * 10**7) == "x" * half + " ... " + "x" * half
    assert in_a_line("x" * 10**4 + ": infl resume a").endswith("x: infl resume a")
    assert in_a_line("x" * 3000 + ": infl resume a").endswith("x: infl resume a")
    assert in_a_line("x" * LONGEST) == "x" * LONGEST
