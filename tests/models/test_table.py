"""The models of docs/models.md: every cell is right, or refused in one line."""

import sys
import time
from pathlib import Path

import pytest

from infl_cli import main as command

sys.path.insert(0, str(Path(__file__).parent))

import cells
from cells import COLUMNS, REFUSED, RIGHT, TIMEOUT, TRACEBACK, WRONG, Subject, cell
from table import models, page

FAST = {
    # A weight with two uses and a parameter of the model itself; no classes, no pictures.
    "TiedAutoencoder": {"norms": RIGHT, "cg": RIGHT, "ablation": RIGHT, "relabelling": REFUSED},
    # Weights that no transform reaches.
    "ListedWeights": {"norms": RIGHT, "cg": RIGHT, "ablation": RIGHT, "attribution": REFUSED},
}
SECONDS = 300


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def subject_of(name, folder):
    file, kind = models()[name]
    return Subject(f"{file}:{kind.__name__}", kind, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_a_few_models(name, tmp_path):
    subject = subject_of(name, tmp_path)
    found = {column: cell(subject, column, SECONDS) for column in COLUMNS}
    assert {one.mark for one in found.values()} <= {RIGHT, REFUSED}, found
    for column, mark in FAST[name].items():
        assert found[column].mark == mark, found[column]
    lines = page({(name, column): one for column, one in found.items()}).splitlines()
    assert sum(line.startswith(f"| {name} |") for line in lines) == 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", models())
def test_every_model(name, tmp_path):
    for maker in ("peft", "timm", "transformers"):
        pytest.importorskip(maker)
    subject = subject_of(name, tmp_path)
    found = {column: cell(subject, column, SECONDS) for column in COLUMNS}
    assert not {c: one for c, one in found.items() if one.mark not in (RIGHT, REFUSED)}


@pytest.mark.slow
def test_numbers_that_differ_are_wrong(tmp_path, monkeypatch):
    subject = subject_of("TiedAutoencoder", tmp_path)
    for kept in ("gradients_NP", "queries_QP"):
        changed = getattr(subject.truth, kept)
        changed *= 1.1
    for column in ("norms", "identity", "influence", "cg", "ek-fac", "baselines"):
        assert cell(subject, column, SECONDS).mark in (WRONG, REFUSED), column
    monkeypatch.setattr(subject.truth, "retrained", lambda *_, **__: subject.weights)
    assert cell(subject, "ablation", SECONDS).mark == WRONG


def test_a_crash_and_a_hang_have_marks_of_their_own(tmp_path, monkeypatch):
    def crashes():
        raise ZeroDivisionError("of the library")

    subject = subject_of("TiedAutoencoder", tmp_path)
    monkeypatch.setattr(command, "main", crashes)
    found = cell(subject, "train", SECONDS)
    assert found.mark == TRACEBACK
    assert "ZeroDivisionError: of the library" in found.words
    monkeypatch.setattr(command, "main", lambda: time.sleep(60))
    assert cell(subject, "train", 1).mark == TIMEOUT

    def refuses(message):
        def refuse():
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)

        return refuse

    monkeypatch.setattr(command, "main", refuses("leave it out"))
    assert cell(subject, "train", SECONDS) == cells.Cell(REFUSED, words="leave it out")
    monkeypatch.setattr(command, "main", refuses("IndexError: tuple index out of range"))
    assert cell(subject, "train", SECONDS).mark == TRACEBACK
